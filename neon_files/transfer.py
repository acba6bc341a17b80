"""Download of one file: resumed where it broke off, verified by length and hash, never left incomplete.

The bytes come through the hub's client (`neon_files.streams`). This module adds what the libraries lack: resuming
after a killed process (the hub's client and pooch both start over), verifying a file before it gets its name, and
keeping received bytes when the connection breaks repeatedly. The bytes go to `.NAME.part` beside the final file;
`.NAME.part.json` records their source.
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
from pathlib import Path

from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.kinds import stand_in
from neon_files.progress import progress_bar
from neon_files.streams import Broken, Source, Stream, network, open_stream

_CHUNK = 1 << 18
ATTEMPTS = 5  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second try, doubled for each further one


class Unreachable(UserError):
    """The server could not be reached at all (not `connected`), or the connection kept breaking."""

    def __init__(self, message: str, connected: bool = True):
        super().__init__(message)
        self.connected = connected


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
        while chunk := file.read(_CHUNK):
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
    failures = 0
    while True:
        before = _size(part)
        try:
            return _receive(source, part, name)
        except Broken as error:
            if error.useless:
                forget(part)
            kept = _size(part)
            failures = 1 if kept > before else failures + 1
            if failures >= ATTEMPTS or not error.connected:
                host = urllib.parse.urlsplit(source.url).netloc
                have = f"; {kept:,} bytes are kept, and the next run continues from there" if kept else ""
                text = f"{name}: no {'lasting ' if error.connected else ''}connection to {host} ({error}){have}"
                raise Unreachable(text, error.connected) from error
        time.sleep(min(BACKOFF * 2 ** (failures - 1), 10.0))


def _receive(source: Source, part: Path, name: str) -> int | None:
    """Download `part` to its full length; returns that length where the server states it. Raises Broken."""
    note = _read_note(part)
    have = _size(part)
    same = (note.get("url"), note.get("version")) == (source.url, source.version)
    if not same or (source.size is not None and have > source.size):
        have = 0
    if have and have == note.get("total"):
        return have
    with open_stream(source, have, note.get("validator", ""), name) as stream:
        expected = source.size if source.size is not None else stream.total
        if stream.total is not None and stream.total != expected:
            raise UserError(
                f"{name}: {source.url} has {stream.total:,} bytes instead of {expected:,}; not the published file"
            )
        _check_space(part, name, expected, stream.start)
        validator = stream.validator or (note.get("validator", "") if stream.start else "")
        identity = {"url": source.url, "version": source.version, "validator": validator, "total": expected}
        with _writing(part):
            if not stream.start:
                part.unlink(
                    missing_ok=True
                )  # before the note changes: another file's bytes must not be continued as this one's
            if identity != note:
                write_json(_note(part), identity)
            _copy(stream, part, expected, name)
    if expected is not None and _size(part) != expected:
        raise Broken(f"ended after {_size(part):,} of {expected:,} bytes")
    return expected


def _check_space(part: Path, name: str, expected: int | None, start: int) -> None:
    missing = (expected or 0) - start
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{name}: needs {missing:,} bytes in {part.parent}, {free:,} are free; make room first")


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """UserError for errors of the disk; those of the network are no OSErrors by now."""
    try:
        yield
    except OSError as error:
        kept = "received bytes are kept" if error.errno == errno.ENOSPC else "mend the folder"
        raise UserError(f"{part}: cannot be written ({error.strerror}); {kept}, and the next run continues") from error


def _copy(stream: Stream, part: Path, total: int | None, name: str) -> None:
    bar = progress_bar(total=total, initial=stream.start, unit="B", unit_scale=True, desc=name, leave=False)
    with bar, open(part, "r+b" if stream.start else "wb") as file:
        file.seek(stream.start)
        try:
            while True:
                with network():
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
