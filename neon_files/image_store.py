"""Storage of an image set, a folder or a .zip: files by relative name, without those that systems leave there."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from neon_files.errors import UserError, one_line

MAX_FILE_BYTES = 1 << 28  # of one image: sixteen times the largest decoded picture of a training set
# Thumbnails, resource forks and waste bins of desktop systems and storage boxes, beside the hidden names.
CLUTTER = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}


def is_clutter(name: str) -> bool:
    """Whether a relative path, or a folder in it, is hidden or was left there by a system, not by the set's maker."""
    return any(part in CLUTTER or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


class Store(Protocol):
    """The files of a set; every method takes names of `names`."""

    names: list[str]

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of a file. Raises OSError or ValueError where it cannot be read."""
        ...

    def stamps(self, names: Iterable[str]) -> Iterable[str]:
        """A text for each file that changes when its content does."""
        ...


def open_store(path: Path) -> Store:
    """UserError where `path` is neither a folder nor a .zip that can be read."""
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() == ".zip":
        return _Zip(path)
    if path.exists():
        raise UserError(f"{path}: is a file; name a folder or a .zip of images")
    raise UserError(f"{path}: no such folder; make the set with the backbone's generate.py")


class _Folder:
    """Links to folders are followed, each folder once."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        folders, visited = [""], set()
        while folders:
            inside = folders.pop()
            try:
                about = os.stat(path / inside)
                if (about.st_dev, about.st_ino) not in visited:
                    visited.add((about.st_dev, about.st_ino))
                    folders += self._list(inside)
            except OSError as error:
                raise UserError(f"{path / inside}: cannot be listed ({error.strerror}); make it readable") from error

    def _list(self, inside: str) -> list[str]:
        """The folders in a folder; its files are added to `names`."""
        folders: list[str] = []
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                if not is_clutter(entry.name):
                    name = f"{inside}/{entry.name}" if inside else entry.name
                    (folders if entry.is_dir() else self.names).append(name)
        return folders

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        about = os.stat(self.path / name)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no regular file")
        if about.st_size > max_bytes:
            raise ValueError(f"it has {about.st_size} bytes, at most {max_bytes} are read")
        return (self.path / name).read_bytes()

    def stamps(self, names: Iterable[str]) -> Iterable[str]:
        for name in names:
            try:
                about = os.stat(self.path / name)
            except OSError as error:
                raise UserError(f"{self.path / name}: cannot be read ({error.strerror})") from error
            yield f"{about.st_size} {about.st_mtime_ns}"


class _Zip:
    def __init__(self, path: Path):
        try:
            self._archive = zipfile.ZipFile(path)
            members = [m for m in self._archive.infolist() if not m.is_dir() and not is_clutter(m.filename)]
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; make the set with the backbone's generate.py") from error
        except Exception as error:  # zipfile raises many kinds on damaged directories
            raise UserError(f"{path}: not a zip archive, or cut short ({one_line(error)}); make it again") from error
        self._members = {member.filename: member for member in members}
        self.names = list(self._members)
        if len(members) > len(self.names):
            twice = next(m.filename for m in members if self._members[m.filename] is not m)
            raise UserError(f"{path}: {twice} is in it twice; make the archive again with each file once")

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        member = self._members[name]
        if member.flag_bits & 1:
            raise ValueError("it is encrypted; store the archive without a password")
        if member.file_size > max_bytes:
            raise ValueError(f"it unpacks to {member.file_size} bytes, at most {max_bytes} are read")
        return self._archive.read(member)

    def stamps(self, names: Iterable[str]) -> Iterable[str]:
        for name in names:
            yield f"{self._members[name].file_size} {self._members[name].CRC}"


class Inside:
    """One folder of another store, as a store."""

    def __init__(self, store: Store, folder: str):
        self._store, self._prefix = store, f"{folder}/"
        self.names = [n.removeprefix(self._prefix) for n in store.names if n.startswith(self._prefix)]

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        return self._store.read(self._prefix + name, max_bytes)

    def stamps(self, names: Iterable[str]) -> Iterable[str]:
        return self._store.stamps(self._prefix + name for name in names)
