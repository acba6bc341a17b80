"""The bytes of a file from any position on, through the hub's client.

Files that the hub stores in Xet come through its Xet library, all others (also of other hosts) through its HTTP
session.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from neon_files.errors import UserError


class Broken(Exception):
    """A transfer that ended early; another try may help. `connected`: the server was reached; `useless`: the local
    bytes are not the beginning of its file."""

    def __init__(self, reason: str | Exception, connected: bool = True, useless: bool = False):
        super().__init__((str(reason) or type(reason).__name__).splitlines()[0])
        self.connected, self.useless = connected, useless


@dataclass(frozen=True)
class Source:
    """The address of a file, and its published size and hashes."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()  # Authorization is not passed on to other hosts
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""  # git's blob id, the hub's hash of small files
    version: str = ""  # changes when the publisher replaces the file
    xet: Any = None  # the hub client's XetFileData, where the hub stores the file in Xet


@dataclass(frozen=True)
class Stream:
    """An open response: its bytes begin at `start` of a file of `total` bytes (None: not stated)."""

    chunks: Iterator[bytes]
    start: int
    total: int | None
    validator: str = ""  # the value for If-Range; "" where the server gives none


def hub_client() -> ModuleType:
    """The module huggingface_hub. It reads its variables when it is imported, where odd values are tracebacks."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]  # empty means unset
        _seconds(name, 0)
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError("huggingface_hub is missing; run `pip install -e .`") from error
    return huggingface_hub


def is_on(name: str) -> bool:
    """Whether an environment variable switches something on, as the hub's client reads it."""
    return os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}


def timeout_seconds() -> int:
    """Silence of a server that counts as a broken connection; HF_HUB_DOWNLOAD_TIMEOUT changes it."""
    return _seconds("HF_HUB_DOWNLOAD_TIMEOUT", 30)


def _seconds(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text}: not a whole number of seconds; set another or unset it")
    return int(text or 0) or default


@contextmanager
def open_stream(source: Source, have: int, validator: str, name: str) -> Iterator[Stream]:
    """`source` from byte `have` on where the server supports it, else from its beginning. Raises Broken and UserError.

    `validator` of an earlier Stream identifies the file to which the first `have` bytes belong.
    """
    xet = _xet_library() if source.xet else None
    with _over_xet(xet, source, have) if xet else _over_http(source, have, validator, name) as stream:
        yield stream


@contextmanager
def _over_http(source: Source, have: int, validator: str, name: str) -> Iterator[Stream]:
    """The file from `have` on where the server still has the same one (`If-Range`), else from its beginning."""
    headers = {**dict(source.headers), "User-Agent": "neon-reference", "Accept-Encoding": "identity"}
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    session = hub_client().get_session()
    with ExitStack() as stack:
        with network():
            response = stack.enter_context(
                session.stream("GET", source.url, headers=headers, timeout=timeout_seconds(), follow_redirects=True)
            )
        code = response.status_code
        if code == 416:  # nothing after `have`: not the file we have the beginning of
            raise Broken("the server's file is shorter than the local part; starting over", useless=True)
        if code >= 500 or code in (408, 429):
            raise Broken(f"it answers {code} {response.reason_phrase}")
        if code not in (200, 206):
            raise UserError(f"{name}: {source.url} answers {code} {response.reason_phrase}{_advice(code)}")
        if source.url.startswith("https:") and response.url.scheme != "https":
            raise UserError(f"{name}: {source.url} leads to {response.url}, which is not encrypted; not fetched")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{name}: {source.url} sends its bytes only in another encoding; fetch it by hand")
        start, total = _position(code, response.headers, have)
        yield Stream(response.iter_raw(), start, total, _validator(response.headers))


def _xet_library() -> ModuleType | None:
    """The hub's library for files in Xet; without it, or with HF_HUB_DISABLE_XET, the same files come over HTTP."""
    if is_on("HF_HUB_DISABLE_XET"):
        return None
    try:
        import hf_xet
    except ImportError:
        return None
    return hf_xet if hasattr(hf_xet, "XetSession") else None  # older ones cannot begin in the middle of a file


@contextmanager
def _over_xet(library: ModuleType, source: Source, have: int) -> Iterator[Stream]:
    """The file from `have` on, out of the hub's store of chunks: many connections, content addressed by its hash."""
    ahead: queue.Queue = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def read() -> None:
        """In a separate thread, since the library reacts to neither Ctrl-C nor a time-out while it waits."""
        try:
            group = library.XetSession().new_download_stream_group(
                token_refresh_url=source.xet.refresh_route, token_refresh_headers=dict(source.headers)
            )
            for chunk in group.download_stream(library.XetFileInfo(source.xet.file_hash, source.size), start=have):
                put(bytes(chunk))
            put(None)
        except Exception as error:
            put(error)

    def put(item: bytes | Exception | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return ahead.put(item, timeout=1)

    def chunks() -> Iterator[bytes]:
        while True:
            try:
                item = ahead.get(timeout=timeout_seconds())
            except queue.Empty:
                raise TimeoutError(f"silent for {timeout_seconds()} s") from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    threading.Thread(target=read, daemon=True).start()
    try:
        yield Stream(chunks(), have, source.size)
    finally:
        stopped.set()


@contextmanager
def network() -> Iterator[None]:
    """Turns every exception of the libraries into Broken: their classes differ by version."""
    try:
        yield
    except Exception as error:
        raise Broken(error, connected=type(error).__name__ != "ConnectError") from error


def _advice(code: int) -> str:
    if code in (401, 403):
        return ": log in with `hf auth login` or set HF_TOKEN, and accept the conditions on its page if it has any"
    return ": it is not there any more; see docs/downloads.md for other places" if code in (404, 410) else ""


def _position(code: int, headers: Mapping[str, str], have: int) -> tuple[int, int | None]:
    """(where the body begins, length of the whole file or None)."""
    if code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match and int(match[1]) <= have:
            return int(match[1]), None if match[2] == "*" else int(match[2])
        raise Broken("the server answers with another part of the file than requested")
    length = headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _validator(headers: Mapping[str, str]) -> str:
    """The value for If-Range: a strong ETag, else the date; "" where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")
