"""Locks between processes, on file systems without flock too."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from filelock import FileLock, SoftFileLock, Timeout

from neon_files.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where filelock takes another kind of lock
    fcntl = None  # type: ignore[assignment]

__all__ = ["Timeout", "Unwritable", "locked", "one_process", "sidecar"]
_WITHOUT_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def locked(path: str | Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`; wait `timeout` seconds for it (-1: for ever). Raises Timeout and OSError.

    Where the file system has no flock (some Lustre, NFS and CIFS mounts) the existence of `path`.soft is the lock.
    flock ends with its process; the softer lock of a killed process is taken over by the next one of the same machine.
    """
    lock: FileLock | SoftFileLock = FileLock(path)
    try:
        _try_flock(path)
        lock.acquire(timeout=timeout)
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        if error.errno not in _WITHOUT_FLOCK:
            raise OSError(error.errno, error.strerror, str(path)) from error  # flock's error does not name the file
        lock = SoftFileLock(f"{path}.soft")  # the native lock may have left its file
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()


def _try_flock(path: str | Path) -> None:
    """Raises the OSError of a file system without flock: filelock's fallback, up to 4.0, admits two holders."""
    if fcntl is not None:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_UN)


class Unwritable(UserError):
    """A folder in which no file can be created."""


@contextmanager
def one_process(final: Path) -> Iterator[None]:
    """Only one process of this node (or shared file system) is in the body for this file; the others wait.

    Raises Unwritable, with the remedy.
    """
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
            raise Unwritable(f"{final.parent}: cannot write there ({reason}); {remedy}") from error
        yield


def sidecar(path: Path, suffix: str) -> Path:
    """The hidden file `.NAME.suffix` beside `path`, NAME cut short where a file system has no room for it."""
    name = path.name
    if len(os.fsencode(name)) > 190:  # room for the temporary names of writing it
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{suffix}")
