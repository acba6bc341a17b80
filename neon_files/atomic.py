"""Atomic writing of files: under a temporary name beside the final one, then renamed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neon_files.errors import UserError

_counter = itertools.count()
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it is too large"}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
_CHUNK = 1 << 22
_LONG = 140  # bytes of a name; file systems take 255


@contextmanager
def atomic_path(final: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path in the folder of `final` (created if missing), renamed to `final` when the body ends.

    If the body fails the temporary is removed and an existing `final` stays as it was. `sync=False` omits the fsync,
    for many small files that a rerun recreates. Raises UserError where the folder cannot be written or the disk is
    full.
    """
    final = Path(final)
    if final.is_dir():
        raise UserError(f"{final}: is a folder; name a file")
    temporary = final.with_name(f"{hidden(final.name)}.{socket.gethostname()}-{os.getpid()}-{next(_counter)}.part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            flush(temporary)
        os.replace(temporary, final)
        if sync:
            flush(final.parent)
    except OSError as error:
        _raise_clear(error, final, temporary)
    except RuntimeError as error:  # torch.save reports a failed write this way
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise UserError(f"{final}: could not be written completely; is the disk full?") from error
        raise
    finally:
        with suppress(OSError):  # gone after the rename, or its folder was never created
            temporary.unlink()


def hidden(name: str) -> str:
    """`.name`, for temporaries and locks beside it: cut where it would leave no room for their endings."""
    encoded = name.encode()
    if len(encoded) <= _LONG:
        return f".{name}"
    return f".{encoded[: _LONG - 20].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def flush(path: str | Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _raise_clear(error: OSError, final: Path, temporary: Path) -> None:
    """Raise UserError where `error` is about writing `final`, else `error` itself."""
    if error.errno in _FULL:
        raise UserError(f"{final}: not written, {_FULL[error.errno]}; free some space or name another place") from error
    ours = error.filename is None or Path(error.filename) in {temporary, final, *final.parents}
    if error.errno in _DENIED and ours:
        raise UserError(f"{final}: cannot write there ({error.strerror}); name another place") from error
    raise error


def remove_stale(final: str | Path) -> None:
    """Delete temporaries of `final` that killed processes of this machine left behind."""
    final = Path(final)
    start = hidden(final.name)
    _remove_stale(final.parent.glob(f"{_glob_escape(start)}.*.part"), re.escape(start))


def remove_stale_below(folder: str | Path) -> None:
    """`remove_stale` for every file of a folder and its subfolders."""
    _remove_stale(Path(folder).rglob(".*.part"), r"\..+")


def _remove_stale(paths: Iterable[Path], start: str) -> None:
    if os.name == "nt":  # where os.kill(pid, 0) can end the process
        return
    pattern = re.compile(start + re.escape(f".{socket.gethostname()}-") + r"(\d+)-\d+\.part")
    for path in paths:
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            path.unlink(missing_ok=True)


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sha256_file(path: str | Path) -> str:
    """64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
