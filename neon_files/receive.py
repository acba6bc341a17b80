"""One file received through the hub's client, continued where it broke off, verified before it gets its name.

The client moves the bytes: `xet_get` those that the hub stores in Xet, `http_stream_backoff` all others, of other
hosts too, with its own retries of a server that does not answer. What it lacks is here: a note beside `.NAME.part`
that says which file its bytes belong to, the request for the rest of exactly that file, and the comparison by length
and hash. (`hf_hub_download` removes its temporary file when it ends early, `http_get` writes in pieces of 10 MB and
asks for a rest without the condition `If-Range`, `xet_get` begins anew.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from neon_files.atomic import flush, write_json
from neon_files.errors import UserError
from neon_files.kinds import stand_in
from neon_files.progress import progress_bar

ATTEMPTS = 5  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second try, doubled for each further one


@dataclass(frozen=True)
class Source:
    """The address of a file, and its published size and hashes."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()  # Authorization is not passed on to other hosts
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""  # git's blob id, the hub's hash of small files
    version: str = ""  # of a file on the hub: its commit, which `url` names, and its ETag
    xet: Any = None  # the hub client's XetFileData, where the hub stores the file in Xet


class Unreachable(UserError):
    """The server could not be reached at all (not `connected`), or the connection kept breaking."""

    def __init__(self, message: str, connected: bool = True):
        super().__init__(message)
        self.connected = connected


class _Broken(Exception):
    """A transfer that ended early; another attempt may help."""


def hub_client() -> ModuleType:
    """The module huggingface_hub. It reads its variables when it is imported, where odd values are tracebacks."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        text = os.environ.get(name, "").strip()
        if not text:
            os.environ.pop(name, None)  # empty means unset
        elif not text.isdecimal():
            raise UserError(f"{name}={text}: not a whole number of seconds; set another or unset it")
    try:
        import huggingface_hub.file_download
    except ImportError as error:
        raise UserError("huggingface_hub is missing; run `pip install -e .`") from error
    return huggingface_hub


def download(source: Source, part: Path, name: str) -> str:
    """Download `source` to `part` and verify it; returns its sha256. The caller holds `one_process`.

    Messages call the file `name`. Raises Unreachable where another try may help, and UserError where the file is
    missing, refused, of another length or hash (then `part` is removed), or cannot be written.
    """
    total = _receive_stubbornly(source, part, name)
    problem, digest = compare(source, part, total)
    if problem:
        forget(part)
        raise UserError(f"{name}: {problem}, from {source.url}; thrown away; try again, or tell its publisher")
    with _writing(part):
        flush(part)
    return digest


def forget(part: Path) -> None:
    """Remove a partial download and the note on its source."""
    for path in (part, _note(part)):
        path.unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def compare(source: Source, path: Path, size: int | None = None) -> tuple[str, str]:
    """(the defect of the bytes of `path` or "", their sha256)."""
    present, expected = path.stat().st_size, source.size if source.size is not None else size
    if expected is not None and present != expected:
        return f"has {present:,} bytes instead of {expected:,}", ""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {present}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 18):
            if file.tell() == len(chunk) and stand_in(chunk[:100]):  # a clearer message than a wrong hash
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
    """`_receive`, repeated after broken connections as long as every few attempts bring new bytes."""
    idle = 0
    while True:
        before = _size(part)
        try:
            return _receive(source, part, name)
        except _Broken as error:
            idle = 1 if _size(part) > before else idle + 1
            if idle >= ATTEMPTS:
                raise _unreachable(source, part, name, error) from error
        time.sleep(min(BACKOFF * 2 ** (idle - 1), 10.0))


def _receive(source: Source, part: Path, name: str) -> int | None:
    """Download `part` to its full length; returns that length where the server states it. Raises _Broken."""
    note, have = _read_note(part), _size(part)
    same = (note.get("url"), note.get("version")) == (source.url, source.version)
    if not same or (source.size is not None and have > source.size):
        forget(part)
        note, have = {}, 0
    if have and have == note.get("total"):
        return have
    if source.xet and not have and hub_client().file_download.is_xet_available():
        return _receive_over_xet(source, part, name)
    return _receive_over_http(source, part, name, note.get("validator", ""))


def _receive_over_xet(source: Source, part: Path, name: str) -> int | None:
    """From the beginning. Xet writes in order, so that after a kill the rest can come over HTTP."""
    _begin(source, part, name, source.size)
    try:
        hub_client().file_download.xet_get(
            incomplete_path=part,
            xet_file_data=source.xet,
            headers=dict(source.headers),
            expected_size=source.size,
            displayed_filename=name,
            tqdm_class=lambda **options: progress_bar(**options | {"leave": False}),
        )
    except Exception as error:  # after the client's own retries
        if not _size(part):
            raise _unreachable(source, part, name, error) from error
        raise _Broken(error) from error
    return source.size


def _receive_over_http(source: Source, part: Path, name: str, validator: str) -> int | None:
    """The rest where the server still has the same file, else all of it."""
    hub, have = hub_client(), _size(part)
    headers = {"user-agent": "neon-reference", **dict(source.headers), "Accept-Encoding": "identity"}
    if have and (validator or source.version):
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    options = {"headers": headers, "timeout": hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    retries = {"max_retries": ATTEMPTS - 1, "base_wait_time": BACKOFF, "retry_on_exceptions": ()}  # 429 and 5xx only
    try:
        with hub.utils.http_stream_backoff("GET", source.url, **retries, **options) as response:
            start, total = _position(source, response, part, name)
            _begin(source, part, name, total, start, _validator(response.headers) or (validator if start else ""))
            _copy(response, part, total, name)
    except (UserError, _Broken):
        raise
    except Exception as error:  # the classes depend on the client's version
        if isinstance(error, hub.errors.HfHubHTTPError) or type(error).__name__ == "ConnectError":
            raise _unreachable(source, part, name, error) from error
        raise _Broken(error) from error
    if total is not None and _size(part) != total:
        raise _Broken(f"ended after {_size(part):,} of {total:,} bytes")
    return total


def _position(source: Source, response: Any, part: Path, name: str) -> tuple[int, int | None]:
    """(where the body begins: 0 or the end of `part`; length of the whole file or None). Raises _Broken, UserError."""
    code, headers, have = response.status_code, response.headers, _size(part)
    begin, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if code == 416 or (code == 206 and not begin.startswith(f"{have}-")):
        forget(part)  # not the beginning of the server's file
        raise _Broken("the server does not have the rest of the local part; starting over")
    if code >= 500 or code == 408:
        raise _Broken(f"it answers {code} {response.reason_phrase}")
    if code not in (200, 206):
        raise UserError(f"{name}: {source.url} answers {code} {response.reason_phrase}{_advice(code)}")
    if source.url.startswith("https:") and response.url.scheme != "https":
        raise UserError(f"{name}: {source.url} leads to {response.url}, which is not encrypted; not fetched")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{name}: {source.url} sends its bytes only in another encoding; fetch it by hand")
    stated = total if code == 206 else headers.get("Content-Length", "")
    if stated.isdecimal() and source.size not in (None, int(stated)):
        raise UserError(
            f"{name}: {source.url} has {int(stated):,} bytes instead of {source.size:,}; not the published file"
        )
    return have if code == 206 else 0, int(stated) if stated.isdecimal() else source.size


def _begin(source: Source, part: Path, name: str, total: int | None, start: int = 0, validator: str = "") -> None:
    """Note which file the bytes of `part` belong to, before its bytes from `start` on come."""
    missing, free = (total or 0) - start, shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{name}: needs {missing:,} bytes in {part.parent}, {free:,} are free; make room first")
    with _writing(part):
        if not start:  # before the note changes: another file's bytes must not be continued as this one's
            part.unlink(missing_ok=True)
        identity = {"url": source.url, "version": source.version, "validator": validator, "total": total}
        write_json(_note(part), identity)


def _copy(response: Any, part: Path, total: int | None, name: str) -> None:
    bar = progress_bar(total=total, initial=_size(part), unit="B", unit_scale=True, desc=name, leave=False)
    with _writing(part), bar, open(part, "ab") as file:
        for chunk in response.iter_raw():
            file.write(chunk)
            bar.update(len(chunk))


def _unreachable(source: Source, part: Path, name: str, error: Exception) -> Unreachable:
    connected, kept = type(error).__name__ != "ConnectError", _size(part)
    have = f"; {kept:,} bytes are kept, and the next run continues from there" if kept else ""
    reason = (str(error).strip() or type(error.__cause__ or error).__name__).splitlines()[0]
    host = urllib.parse.urlsplit(source.url).netloc
    return Unreachable(f"{name}: no {'lasting ' if connected else ''}connection to {host} ({reason}){have}", connected)


def _advice(code: int) -> str:
    if code in (401, 403):
        return ": log in with `hf auth login` or set HF_TOKEN, and accept the conditions on its page if it has any"
    return ": it is not there any more; see docs/downloads.md for other places" if code in (404, 410) else ""


def _validator(headers: Any) -> str:
    """The value for If-Range: a strong ETag, else the date; "" where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """UserError for errors of the disk; those of the network are no OSErrors by now."""
    try:
        yield
    except OSError as error:
        kept = "received bytes are kept" if error.errno == errno.ENOSPC else "mend the folder"
        raise UserError(f"{part}: cannot be written ({error.strerror}); {kept}, and the next run continues") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(part: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(_note(part).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
