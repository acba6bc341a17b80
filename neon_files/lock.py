"""One process at a time, on file systems without flock too."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

__all__ = ["Timeout", "locked"]
_WITHOUT_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def locked(path: str | Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`; wait `timeout` seconds for it (-1: for ever). Raises Timeout and OSError.

    Where the file system knows no flock (some Lustre, NFS and CIFS mounts) the existence of `path`.soft is the lock.
    flock ends with its process; the softer lock of a killed process is taken over by the next one of the same machine.
    """
    lock: FileLock | SoftFileLock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise
        if isinstance(error, OSError) and error.errno not in _WITHOUT_FLOCK:
            raise OSError(error.errno, error.strerror, str(path)) from error  # flock's own does not name the file
        lock = SoftFileLock(f"{path}.soft")  # the native lock may have left its file
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()
