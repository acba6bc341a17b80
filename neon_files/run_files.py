"""Files that a run writes and reads again: a damaged one is reported, and set aside where it can be recomputed.

A JSON record carries the digest of its content; the archive that torch writes has a check sum for each of its members.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, SoftFileLock, Timeout

from neon_files.atomic import atomic_path, sha256_file, write_json
from neon_files.errors import UserError, say

T = TypeVar("T")
NUMBER = (int, float)
WEIGHTS = (".safetensors", ".pt", ".pth", ".pkl")  # always hashed: a flipped bit changes neither size nor time
_UNREADABLE = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, ValueError, LookupError,
               EOFError, MemoryError, ArithmeticError, AttributeError, TypeError)  # fmt: skip
_TEMPORARY = re.compile(r"\..+\.[^/]+-\d+-\d+\.part")  # as `atomic_path` names them
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


class DamagedFile(UserError):
    """A file of the run whose content is not what was written."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: damaged ({problem}); put it back from a copy, or begin in another folder")
        self.path, self.problem = path, problem

    def __reduce__(self):  # it may come from a worker process
        return type(self), (self.path, self.problem)


def write_record(path: str | Path, value: Mapping[str, Any]) -> None:
    """`value` as JSON with its digest, atomically."""
    value = json.loads(json.dumps(value, default=str))
    write_json(path, {**value, "digest": _digest(value)})


def read_record(path: str | Path, types: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The object in a JSON file of this run. `types`: entries it must have. Raises DamagedFile, FileNotFoundError."""
    path = Path(path)
    with _readable(path):
        text = path.read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, "no JSON") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, "no JSON object")
    expected = value.pop("digest", None)
    if expected is not None and expected != _digest(value):
        raise DamagedFile(path, "its digest does not fit")
    for name, kind in (types or {}).items():
        if not isinstance(value.get(name), kind):
            raise DamagedFile(path, f"{name} is missing or of another type")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_tensors(path: str | Path, use: Callable[[Any], T] = lambda value: value, mmap: bool = False) -> T:
    """`use(content)` of a file of `torch.save`, on the CPU, after its check sums. Raises FileNotFoundError, and
    DamagedFile, also for content that `use` cannot handle."""
    path = Path(path)
    with _readable(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise DamagedFile(path, f"the check sum of {broken} does not fit")
            return use(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
        except _UNREADABLE as error:
            raise DamagedFile(path, "cut short, overwritten or of another kind") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """OSErrors of the system, but for a missing file, as one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise DamagedFile(path, "a folder") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset that was overwritten
            raise DamagedFile(path, "overwritten") from error
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the disk and your rights"
        ) from error


def unchanged(path: str | Path, recorded: Sequence[Any]) -> bool:
    """Whether a file has the `recorded` identity. Where size and time agree, only weights are hashed."""
    path = Path(path)
    try:
        size, mtime, sha256 = recorded
        stat = path.stat()
        if stat.st_size == size and stat.st_mtime_ns == mtime and path.suffix not in WEIGHTS:
            return True
        return stat.st_size == size and sha256_file(path) == sha256
    except FileNotFoundError:
        return False


def identity(path: str | Path) -> list[Any]:
    """[size, modification time in ns, sha256] of a file."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, sha256_file(path)]


def intact(path: str | Path, read: Callable[..., T], *args: Any, **options: Any) -> T | None:
    """`read(path, ...)`; None where the file is missing or damaged; a damaged one is set aside and reported."""
    try:
        return read(path, *args, **options)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        set_aside(error.path, error.problem)
        return None


def set_aside(path: str | Path, problem: str) -> None:
    """Rename to <name>.damaged, so that it is recomputed, and report it."""
    path = Path(path)
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    say(f"{path}: damaged ({problem}); kept as {aside.name}, made again")


@contextmanager
def one_run(folder: str | Path) -> Iterator[None]:
    """The body is the only run in `folder`, whose leftovers of killed writes it removes first. Raises UserError."""
    folder = Path(folder)
    owner = folder / ".run.owner"
    lock = _lock(folder, owner)
    try:
        remove_temporaries(folder)
        with atomic_path(owner) as temporary:
            temporary.write_text(f"{socket.gethostname()}, pid {os.getpid()}", encoding="utf-8")
        yield
    finally:
        for path in (owner, Path(lock.lock_file)):  # while it is held: who waits for it sees that it is gone
            with suppress(OSError):
                path.unlink()
        lock.release()


def _lock(folder: Path, owner: Path) -> FileLock | SoftFileLock:
    path = folder / ".run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            lock = SoftFileLock(path.with_suffix(".soft"), timeout=0)  # where the file system supports no locks
            lock.acquire()
    except Timeout as error:
        whose = "unknown"
        with suppress(OSError, ValueError):
            whose = owner.read_text(encoding="utf-8")
        raise UserError(f"{folder}: another run is in this folder ({whose}); wait for it, or stop it first") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); name another folder") from error
    return lock


def remove_temporaries(folder: str | Path) -> None:
    """Delete the temporaries of killed writes anywhere below `folder`. Nobody may be writing there."""
    for place, _, names in os.walk(folder):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(place, name))
