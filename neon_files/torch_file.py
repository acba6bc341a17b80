"""Files of `torch.save`, zip and legacy, as inert trees with lazy tensors; nothing in them is executed.

torch's reader maps members without checking that they are uncompressed, and verifies no checksum.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import UntypedStorage

from neon_files.guard import AGAIN, Refused, Unfit
from neon_files.inert import InertUnpickler, Name
from neon_files.lazy_tensor import TABLE, Storage, StorageType

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, pickled; the protocol comes before
_LEGACY_PROTOCOL = 1001
_LARGEST_PICKLE = 64 << 20  # bytes of the descriptions in a compressed file
_LARGEST_GROWTH = 20  # times the archive's size, that compressed members may grow to; weights hardly shrink at all
_ALWAYS_ALLOWED = 256 << 20  # bytes
_CHUNK = 1 << 20


def map_file(path: str | Path) -> UntypedStorage:
    """The whole file as memory that is read when touched; writing to it does not change the file."""
    mapped: Any = UntypedStorage.from_file(os.fspath(path), False, os.path.getsize(path))
    return mapped


def part_of(whole: UntypedStorage, start: int, end: int, itemsize: int) -> UntypedStorage:
    """Bytes `start` to `end`, copied only where numbers of `itemsize` bytes would not lie on a multiple of it."""
    if not 0 <= start <= end <= whole.nbytes():
        raise EOFError("reaches beyond the end of the file")
    part = whole[start:end]
    return part if part.data_ptr() % itemsize == 0 else part.clone()


def read_zip(file: BinaryIO, whole: Callable[[], UntypedStorage]) -> Any:
    """The saved content. `whole()` is the archive as memory, called for the first uncompressed member that is loaded.

    Raises Unfit, Refused, or whatever error damage leads to.
    """
    archive = _Archive(file, whole)
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        key, dtype, count = _described(pid)
        if key not in storages:
            storages[key] = archive.storage(key, dtype, count * dtype.itemsize)
        return storages[key]

    return InertUnpickler(io.BytesIO(archive.pickle()), TABLE, persistent).load()


class _Archive:
    """The members of a torch zip, each read with its checksum."""

    def __init__(self, file: BinaryIO, whole: Callable[[], UntypedStorage]):
        self._file, self._whole = file, whole
        self._mapped: UntypedStorage | None = None
        self._zip = zipfile.ZipFile(file)
        self._size = file.seek(0, 2)
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise Unfit("two members have one name")
        roots = [name.removesuffix("data.pkl") for name in self._members if f"/{name}".endswith("/data.pkl")]
        if any(name.endswith(".npy") for name in self._members):
            raise Unfit("is a NumPy archive (reference statistics?), not weights")
        if len(roots) != 1:
            raise Unfit("is a zip archive, but not one of torch" if not roots else "holds several torch files")
        self._root = roots[0]
        if f"{self._root}constants.pkl" in self._members:
            raise Unfit("is a TorchScript program, not weights; save its state_dict instead")
        if any(member.flag_bits & 1 for member in members):
            raise Unfit("is encrypted; unpack it and save it without a password")
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
            raise Unfit("is compressed by an unsupported method; unpack it and zip it again")
        stored = [member.file_size for member in members if member.compress_type == zipfile.ZIP_STORED]
        if sum(stored) > self._size:
            raise Unfit("its members overlap; it is damaged, or made to fill the memory")
        grown = sum(member.file_size for member in members) - sum(stored)
        if grown > max(_ALWAYS_ALLOWED, _LARGEST_GROWTH * self._size):
            raise Unfit(f"would unpack to {grown:,} bytes, far more than weights compress to")
        self._checked = any(member.CRC for member in members)  # torch can save without: all are 0 then
        if not self._checked:
            for member in members:
                del member.CRC  # without it zipfile compares nothing
        if "byteorder" in self._suffixes() and self._read("byteorder", 16) != b"little":
            raise Unfit("was saved on a big-endian machine; load and save it there with the other byte order")

    def _suffixes(self) -> set[str]:
        return {name.removeprefix(self._root) for name in self._members}

    def pickle(self) -> bytes:
        return self._read("data.pkl", _LARGEST_PICKLE)

    def _read(self, name: str, largest: int) -> bytes:
        member = self._members[self._root + name]
        if member.file_size > (self._size if member.compress_type == zipfile.ZIP_STORED else largest):
            raise Unfit(f"its member {name} is {member.file_size:,} bytes")
        return self._zip.read(member)

    def storage(self, key: str, dtype: torch.dtype, nbytes: int) -> Storage:
        member = self._members.get(f"{self._root}data/{key}")
        if member is None or member.file_size < nbytes:
            raise EOFError(f"the numbers of its storage {key[:20]} are missing")
        return Storage(dtype, nbytes, lambda: self._load(member, nbytes, dtype.itemsize))

    def _load(self, member: zipfile.ZipInfo, nbytes: int, itemsize: int) -> UntypedStorage:
        if member.compress_type != zipfile.ZIP_STORED:
            return self._unpacked(member)[:nbytes]
        if self._mapped is None:
            self._mapped = self._whole()
        start = self._start(member)
        whole = part_of(self._mapped, start, start + member.file_size, itemsize)
        if self._checked and zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(whole).numpy()) != member.CRC:
            raise Unfit(f"its member {member.filename} differs from its checksum")
        return whole[:nbytes]

    def _unpacked(self, member: zipfile.ZipInfo) -> UntypedStorage:
        memory, end = torch.empty(member.file_size, dtype=torch.uint8), 0
        view = memoryview(memory.numpy())
        with self._zip.open(member) as file:  # which compares the checksum at the end
            while chunk := file.read(_CHUNK):
                view[end : end + len(chunk)] = chunk
                end += len(chunk)
        if end != member.file_size:
            raise EOFError(f"its member {member.filename[:100]} is cut short")
        return memory.untyped_storage()

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Where the member's bytes begin: behind a local header, whose name and extra field vary in length."""
        self._file.seek(member.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise EOFError(f"its member {member.filename} has no header")
        name, extra = struct.unpack("<HH", header[26:30])
        return member.header_offset + 30 + name + extra


def memory_of(data: bytes) -> UntypedStorage:
    """A copy of `data` that may be written to."""
    return _read_part(io.BytesIO(data), 0, len(data))


def _described(pid: Any, length: int = 5) -> tuple[str, torch.dtype, int]:
    """(key, dtype, number of elements) of a reference to a storage."""
    if not isinstance(pid, tuple) or len(pid) != length or pid[0] != "storage" or not isinstance(pid[1], StorageType):
        raise Refused("refers to an external object that is no storage")
    key, count = pid[2], pid[4]
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 48:
        raise Refused("refers to a storage with an invalid key or length")
    return key, pid[1].dtype, count


def read_legacy(file: BinaryIO) -> Any:
    """The content of a file in the format before torch 1.6: pickles one after another, then the numbers."""
    size = file.seek(0, 2)
    file.seek(0)
    places: dict[str, int] = {}  # where the numbers of a storage begin; filled after the pickle is read
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
            return pid[1]  # a class, with its source text
        if isinstance(pid, tuple) and len(pid) == 6 and pid[5] is not None:
            raise Refused("holds views of storages, which torch has not written since version 0.4; save it anew")
        key, dtype, count = _described(pid, 6)
        if key not in storages:
            nbytes = count * dtype.itemsize
            storages[key] = Storage(dtype, nbytes, lambda: _read_part(file, places[key], nbytes))
        return storages[key]

    if InertUnpickler(file, {}).load() != LEGACY_MAGIC or InertUnpickler(file, {}).load() != _LEGACY_PROTOCOL:
        raise Unfit("is of an unknown format of torch")
    if InertUnpickler(file, {}).load().get("little_endian") is not True:
        raise Unfit("was saved on a big-endian machine")
    content = InertUnpickler(file, TABLE, persistent).load()
    keys = InertUnpickler(file, {}).load()
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise EOFError("the numbers of some storages are missing")
    for key in keys:
        count = struct.unpack("<q", file.read(8))[0]
        places[key] = file.tell()
        if count * storages[key].dtype.itemsize != storages[key].nbytes:
            raise EOFError(f"the numbers of its storage {key[:20]} are of another length")
        if file.seek(places[key] + storages[key].nbytes) > size:
            raise EOFError("ends within its numbers")
    return content


def _read_part(file: BinaryIO, start: int, nbytes: int) -> UntypedStorage:
    memory = torch.empty(nbytes, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(memory.numpy()) != nbytes:  # type: ignore[attr-defined]  # as every binary file of Python has
        raise EOFError("ends within its numbers")
    return memory.untyped_storage()


def read_torch(path: Path, is_zip: bool) -> Any:
    """The content of `path`. The file stays open while its lazy tensors exist."""
    if is_zip and not zipfile.is_zipfile(path):
        raise Unfit(f"cut short (a torch file without its end); {AGAIN}")
    file = open(path, "rb")  # noqa: SIM115  held by the lazy tensors
    return read_zip(file, lambda: map_file(path)) if is_zip else read_legacy(file)
