"""One file over HTTP: resumed where it broke off, checked by length and hash, whole or not there.

The bytes go to `NAME.part` beside the final file, with a note of what they belong to (`NAME.part.json`). The next try
asks for the rest by `Range`, on condition (`If-Range`) that the server's file is still the same one.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click
from filelock import FileLock, Timeout
from tqdm import tqdm

from neon_files.errors import UserError

_CHUNK = 1 << 18
ATTEMPTS = 5  # in a row that brought nothing new
BACKOFF = 1.0  # seconds before the second try, doubled for each further one


class Unreachable(UserError):
    """The server could not be reached at all (not `connected`), or the connection kept breaking."""

    def __init__(self, message: str, connected: bool = True):
        super().__init__(message)
        self.connected = connected


def timeout_seconds() -> float:
    """Silence of a server that counts as a broken connection; HF_HUB_DOWNLOAD_TIMEOUT changes it."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 30))


@dataclass(frozen=True)
class Source:
    """Where the bytes are, and what is known of them."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()  # Authorization is not passed on to other hosts
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""  # git's blob id, the hub's hash of small files
    version: str = ""  # changes when the publisher replaces the file


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but does not hand our credentials to another host."""

    def redirect_request(self, request, file, code, message, headers, url):
        following = super().redirect_request(request, file, code, message, headers, url)
        same_host = following and urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(request.full_url).netloc
        if following is not None and not same_host:
            following.remove_header("Authorization")
        return following


_opener = urllib.request.build_opener(_Redirect)


@contextmanager
def one_process(final: Path) -> Iterator[None]:
    """Only one process of this node (or shared file system) is in the body for this file; the others wait."""
    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            click.echo(f"{final.name}: another process is fetching it; waiting", err=True)
            lock.acquire()
    except OSError as error:
        reason = "a broken link" if final.parent.is_symlink() and not final.parent.exists() else error.strerror
        remedy = "mend that, or set NEON_HOME to another folder"
        raise UserError(f"{final.parent}: cannot write there ({reason}); {remedy}") from error
    try:
        yield
    finally:
        lock.release()  # the system gives it back where the process is killed


def download(source: Source, final: Path) -> str:
    """Fetch `source` to `final`; gives its sha256. The caller holds `one_process(final)`.

    Raises Unreachable where another try may help, and UserError where the file is missing, refused, of another length
    or hash, or cannot be written. Only a file that passed all checks gets its name.
    """
    part, note = final.with_name(f"{final.name}.part"), final.with_name(f"{final.name}.part.json")
    total = _receive_stubbornly(source, part, note, final.name)
    problem, digest = compare(source, part, total)
    note.unlink(missing_ok=True)
    if problem:
        part.unlink()
        raise UserError(f"{final.name}: {problem}, from {source.url}; thrown away; try again, or tell its publisher")
    os.replace(part, final)
    return digest


def compare(source: Source, path: Path, size: int | None = None) -> tuple[str, str]:
    """(what is wrong with the bytes of `path` or "", their sha256)."""
    found, expected = path.stat().st_size, source.size if source.size is not None else size
    if expected is not None and found != expected:
        return f"has {found:,} bytes instead of {expected:,}", ""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {found}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            if source.git_sha1:
                sha1.update(chunk)
    if source.sha256 and sha256.hexdigest() != source.sha256:
        return f"has the sha256 {sha256.hexdigest()} instead of {source.sha256}", sha256.hexdigest()
    if source.git_sha1 and sha1.hexdigest() != source.git_sha1:
        return f"has the git hash {sha1.hexdigest()} instead of {source.git_sha1}", sha256.hexdigest()
    return "", sha256.hexdigest()


def _receive_stubbornly(source: Source, part: Path, note: Path, name: str) -> int | None:
    """`_receive`, going on where the connection broke as long as every few tries bring new bytes."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _receive(source, part, note, name)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{name}: {source.url} answers {error.code} {error.reason}{_advice(error)}") from error
            reason: Exception = error
        except (OSError, http.client.HTTPException) as error:  # of the network: writing has its own errors
            reason = error
        failures = 1 if _size(part) > before else failures + 1
        connected = not isinstance(reason, urllib.error.URLError) or isinstance(reason, urllib.error.HTTPError)
        if failures >= ATTEMPTS or (not connected and not isinstance(reason.reason, TimeoutError)):
            host, kept = urllib.parse.urlsplit(source.url).netloc, _size(part)
            have = f"; {kept:,} bytes are kept, and the next run goes on from there" if kept else ""
            text = f"{name}: no {'lasting ' if connected else ''}connection to {host} ({_first_line(reason)}){have}"
            raise Unreachable(text, connected) from reason
        time.sleep(min(BACKOFF * 2 ** (failures - 1), 10.0))


def _advice(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return ": log in with `hf auth login` or set HF_TOKEN, and accept the conditions on its page if it has any"
    return ": it is not there any more; see docs/downloads.md for other places" if error.code in (404, 410) else ""


def _first_line(error: Exception) -> str:
    return (str(getattr(error, "reason", None) or error) or type(error).__name__).splitlines()[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(source: Source, part: Path, note: Path, name: str) -> int | None:
    """Bring `part` to its full length; gives that length where the server tells it."""
    known = _read_note(note)
    have = _size(part)
    if have and (known.get("url"), known.get("version")) != (source.url, source.version):
        have = 0
    if have and have == known.get("total"):
        return have
    headers = {**dict(source.headers), "User-Agent": "neon-reference", "Accept-Encoding": "identity"}
    if have and known.get("validator"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    try:
        response = _opener.open(urllib.request.Request(source.url, headers=headers), timeout=timeout_seconds())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after `have`: not the file we have the beginning of
            part.unlink(missing_ok=True)
            raise ConnectionError("the server has fewer bytes than are here; starting over") from error
        raise
    with response:
        start, total = _position(response, have)
        expected = source.size if source.size is not None else total
        if total is not None and total != expected:
            raise UserError(f"{name}: {source.url} has {total:,} bytes instead of {expected:,}; not the published file")
        _check_space(part, name, expected, start)
        validator = _validator(response)
        with _writing(part), open(part, "r+b" if start else "wb") as file:
            identity = {"url": source.url, "version": source.version, "validator": validator, "total": expected}
            note.write_text(json.dumps(identity))
            file.seek(start)
            _copy(response, file, start, expected, name)
    if expected is not None and _size(part) != expected:
        raise ConnectionError(f"ended after {_size(part):,} of {expected:,} bytes")
    return expected


def _position(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """(where the body begins, length of the whole file or None)."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match and int(match[1]) <= have:
            return int(match[1]), None if match[2] == "*" else int(match[2])
        raise ConnectionError("the server answers with another part of the file than was asked for")
    length = response.headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _validator(response: http.client.HTTPResponse) -> str:
    """What If-Range may carry: a strong ETag, else the date; "" where the server gives neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _check_space(part: Path, name: str, expected: int | None, start: int) -> None:
    missing = (expected or 0) - start
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{name}: needs {missing:,} bytes in {part.parent}, {free:,} are free; make room first")


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """UserError for what goes wrong on the disk. Errors of the network are told apart by having passed `_copy`."""
    try:
        yield
    except _NetworkError as error:
        raise error.reason from error
    except OSError as error:
        kept = "what has come is kept" if error.errno == errno.ENOSPC else "mend the folder"
        raise UserError(f"{part}: cannot be written ({error.strerror}); {kept}, and the next run goes on") from error


class _NetworkError(Exception):
    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


def _copy(response: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, name: str) -> None:
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        while True:
            try:
                chunk = response.read1(_CHUNK)  # what is there, so that a silence loses nothing
            except (OSError, http.client.HTTPException) as error:
                raise _NetworkError(error) from error
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


def _read_note(note: Path) -> dict:
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
