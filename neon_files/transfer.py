"""The bytes of one file: gone on with where they broke off, checked by length and hash, whole or not there.

They come through the hub's client: its Xet library for files that the hub stores so, its HTTP session for all others.
What no library does is here: to go on after a killed process (the hub's client and pooch both start over), to hash
what came before it gets its name, and to keep what came when the connection breaks again and again. The bytes go to
`.NAME.part` beside the final file, with a note of what they belong to (`.NAME.part.json`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from tqdm import tqdm

from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.kinds import stand_in
from neon_files.lock import Timeout, locked

_CHUNK = 1 << 18
ATTEMPTS = 5  # in a row that brought nothing new
BACKOFF = 1.0  # seconds before the second try, doubled for each further one


class Unreachable(UserError):
    """The server could not be reached at all (not `connected`), or the connection kept breaking."""

    def __init__(self, message: str, connected: bool = True):
        super().__init__(message)
        self.connected = connected


class _Broken(Exception):
    """A transfer that ended early; another try may help. `connected`: the server was there."""

    def __init__(self, reason: str | Exception, connected: bool = True):
        super().__init__((str(reason) or type(reason).__name__).splitlines()[0])
        self.connected = connected


@dataclass(frozen=True)
class Source:
    """Where the bytes are, and what is known of them."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()  # Authorization is not passed on to other hosts
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""  # git's blob id, the hub's hash of small files
    version: str = ""  # changes when the publisher replaces the file
    xet: Any = None  # the hub client's XetFileData, where the hub stores the file in Xet


@dataclass(frozen=True)
class _Stream:
    """An open answer: its bytes begin at `start` of a file of `total` bytes (None: not stated)."""

    chunks: Iterator[bytes]
    start: int
    total: int | None
    validator: str = ""  # what If-Range may carry; "" where the server gives nothing


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
def one_process(final: Path) -> Iterator[None]:
    """Only one process of this node (or shared file system) is in the body for this file; the others wait."""
    lock = sidecar(final, "lock")
    with ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(lock, timeout=0))
            except Timeout:
                note = f"if none is left on any machine, delete {lock}*"
                click.echo(f"{final.name}: another process is fetching it; waiting ({note})", err=True)
                stack.enter_context(locked(lock))
        except OSError as error:
            reason = "a broken link" if final.parent.is_symlink() and not final.parent.exists() else error.strerror
            remedy = "mend that, or set NEON_HOME to another folder"
            raise UserError(f"{final.parent}: cannot write there ({reason}); {remedy}") from error
        yield


def sidecar(path: Path, suffix: str) -> Path:
    """The hidden file `.NAME.suffix` beside `path`, NAME cut short where a file system has no room for it."""
    name = path.name
    if len(os.fsencode(name)) > 190:  # room for the temporary names of writing it
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{suffix}")


def download(source: Source, part: Path, name: str) -> str:
    """Bring all bytes of `source` to `part` and check them; gives their sha256. The caller holds `one_process`.

    Messages call the file `name`. Raises Unreachable where another try may help, and UserError where the file is
    missing, refused, of another length or hash (then `part` is removed), or cannot be written.
    """
    total = _receive_stubbornly(source, part, name)
    problem, digest = compare(source, part, total)
    if problem:
        forget(part)
        raise UserError(f"{name}: {problem}, from {source.url}; thrown away; try again, or tell its publisher")
    return digest


def forget(part: Path) -> None:
    """Remove what a download left of `part`, and the note on what it belongs to."""
    for path in (part, _note(part)):
        path.unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def compare(source: Source, path: Path, size: int | None = None) -> tuple[str, str]:
    """(what is wrong with the bytes of `path` or "", their sha256)."""
    present, expected = path.stat().st_size, source.size if source.size is not None else size
    if expected is not None and present != expected:
        return f"has {present:,} bytes instead of {expected:,}", ""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {present}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            if file.tell() == len(chunk) and stand_in(chunk[:100]):  # where a hash is known, this says more
                return stand_in(chunk[:100]), ""
            sha256.update(chunk)
            if source.git_sha1:
                sha1.update(chunk)
    if source.sha256 and sha256.hexdigest() != source.sha256:
        return f"has the sha256 {sha256.hexdigest()} instead of {source.sha256}", sha256.hexdigest()
    if source.git_sha1 and sha1.hexdigest() != source.git_sha1:
        return f"has the git hash {sha1.hexdigest()} instead of {source.git_sha1}", sha256.hexdigest()
    return "", sha256.hexdigest()


def _receive_stubbornly(source: Source, part: Path, name: str) -> int | None:
    """`_receive`, going on where the connection broke as long as every few tries bring new bytes."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _receive(source, part, name)
        except _Broken as error:
            kept = _size(part)
            failures = 1 if kept > before else failures + 1
            if failures >= ATTEMPTS or not error.connected:
                host = urllib.parse.urlsplit(source.url).netloc
                have = f"; {kept:,} bytes are kept, and the next run goes on from there" if kept else ""
                text = f"{name}: no {'lasting ' if error.connected else ''}connection to {host} ({error}){have}"
                raise Unreachable(text, error.connected) from error
        time.sleep(min(BACKOFF * 2 ** (failures - 1), 10.0))


def _receive(source: Source, part: Path, name: str) -> int | None:
    """Bring `part` to its full length; gives that length where the server tells it. Raises _Broken."""
    known = _read_note(part)
    have = _size(part)
    same = (known.get("url"), known.get("version")) == (source.url, source.version)
    if not same or (source.size is not None and have > source.size):
        have = 0
    if have and have == known.get("total"):
        return have
    with ExitStack() as stack:
        xet = _xet_library() if source.xet else None
        if xet:
            stream = stack.enter_context(_over_xet(xet, source, have))
        else:
            stream = stack.enter_context(_over_http(source, part, have, known.get("validator", ""), name))
        expected = source.size if source.size is not None else stream.total
        if stream.total is not None and stream.total != expected:
            raise UserError(
                f"{name}: {source.url} has {stream.total:,} bytes instead of {expected:,}; not the published file"
            )
        _check_space(part, name, expected, stream.start)
        validator = stream.validator or (known.get("validator", "") if stream.start else "")
        identity = {"url": source.url, "version": source.version, "validator": validator, "total": expected}
        with _writing(part):
            if not stream.start:
                part.unlink(missing_ok=True)  # before the note changes: what another file began must not go on as this
            if identity != known:
                write_json(_note(part), identity)
            _copy(stream, part, expected, name)
    if expected is not None and _size(part) != expected:
        raise _Broken(f"ended after {_size(part):,} of {expected:,} bytes")
    return expected


@contextmanager
def _over_http(source: Source, part: Path, have: int, validator: str, name: str) -> Iterator[_Stream]:
    """The file from `have` on where the server still has the same one (`If-Range`), else from its beginning."""
    headers = {**dict(source.headers), "User-Agent": "neon-reference", "Accept-Encoding": "identity"}
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    session = hub_client().get_session()
    with ExitStack() as stack:
        with _network():
            response = stack.enter_context(
                session.stream("GET", source.url, headers=headers, timeout=timeout_seconds(), follow_redirects=True)
            )
        code = response.status_code
        if code == 416:  # nothing after `have`: not the file we have the beginning of
            part.unlink(missing_ok=True)
            raise _Broken("the server has fewer bytes than are here; starting over")
        if code >= 500 or code in (408, 429):
            raise _Broken(f"it answers {code} {response.reason_phrase}")
        if code not in (200, 206):
            raise UserError(f"{name}: {source.url} answers {code} {response.reason_phrase}{_advice(code)}")
        if source.url.startswith("https:") and response.url.scheme != "https":
            raise UserError(f"{name}: {source.url} leads to {response.url}, which is not encrypted; not fetched")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{name}: {source.url} sends its bytes only in another encoding; fetch it by hand")
        start, total = _position(code, response.headers, have)
        yield _Stream(response.iter_raw(), start, total, _validator(response.headers))


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
def _over_xet(library: ModuleType, source: Source, have: int) -> Iterator[_Stream]:
    """The file from `have` on, out of the hub's store of chunks: many connections, content addressed by its hash."""
    ahead: queue.Queue = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def read() -> None:
        """In a thread of its own, since the library hears neither Ctrl-C nor a time-out while it waits."""
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
        yield _Stream(chunks(), have, source.size)
    finally:
        stopped.set()


@contextmanager
def _network() -> Iterator[None]:
    """_Broken for whatever the libraries raise: their classes differ by version, and nothing else runs here."""
    try:
        yield
    except Exception as error:
        raise _Broken(error, connected=type(error).__name__ != "ConnectError") from error


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
        raise _Broken("the server answers with another part of the file than was asked for")
    length = headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _validator(headers: Mapping[str, str]) -> str:
    """What If-Range may carry: a strong ETag, else the date; "" where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _check_space(part: Path, name: str, expected: int | None, start: int) -> None:
    missing = (expected or 0) - start
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{name}: needs {missing:,} bytes in {part.parent}, {free:,} are free; make room first")


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """UserError for what goes wrong on the disk; errors of the network are no OSErrors any more."""
    try:
        yield
    except OSError as error:
        kept = "what has come is kept" if error.errno == errno.ENOSPC else "mend the folder"
        raise UserError(f"{part}: cannot be written ({error.strerror}); {kept}, and the next run goes on") from error


def _copy(stream: _Stream, part: Path, total: int | None, name: str) -> None:
    bar = tqdm(total=total, initial=stream.start, unit="B", unit_scale=True, desc=name, disable=None, leave=False)
    with bar, open(part, "r+b" if stream.start else "wb") as file:
        file.seek(stream.start)
        try:
            while True:
                with _network():
                    chunk = next(stream.chunks, None)
                if chunk is None:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        finally:
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(part: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(_note(part).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
