"""Folders of `torch.distributed.checkpoint`: `.metadata` and parts (`__0_0.distcp`), put together tensor by tensor.

torch's reader unpickles `.metadata`, which can run code; here it is an inert tree like any other pickle, and
each part of a tensor is a separate torch zip.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_files.atomic import sha256_file
from neon_files.guard import Unfit, reading
from neon_files.inert import InertUnpickler, Record
from neon_files.lazy_tensor import TABLE, LazyTensor
from neon_files.torch_file import memory_of, read_zip

METADATA = ".metadata"


def is_distributed(path: str | Path) -> bool:
    """Is `path` the folder of a distributed checkpoint?"""
    return (Path(path) / METADATA).is_file()


def sha256_distributed(folder: str | Path) -> str:
    """One digest of the names and contents of all files of the folder."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    lines = "".join(f"{sha256_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class _Part:
    """A box of a tensor, and the place of its numbers."""

    path: Path
    offset: int  # bytes
    length: int
    start: tuple[int, ...]  # of the box within the tensor
    size: tuple[int, ...]

    def load(self) -> Tensor:
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
            content = read_zip(io.BytesIO(data), lambda: memory_of(data))
            if not isinstance(content, LazyTensor) or content.shape != self.size:
                raise Unfit(f"holds no tensor of {list(self.size)} at byte {self.offset}; the folder is damaged")
            return content.load()


class PartedTensor(LazyTensor):
    """A tensor of several ranks' parts; they are read and joined when it is loaded."""

    __slots__ = ("_parts",)

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], parts: Sequence[_Part]):
        self.shape, self._dtype, self._parts = shape, dtype, parts

    def load(self) -> Tensor:
        whole, filled = torch.empty(self.shape, dtype=self._dtype), torch.zeros(self.shape, dtype=torch.bool)
        for part in self._parts:
            box = tuple(slice(start, start + size) for start, size in zip(part.start, part.size, strict=True))
            numbers = part.load()
            if numbers.dtype != self._dtype:
                raise Unfit(f"{part.path.name} holds {numbers.dtype}, {METADATA} says {self._dtype}")
            whole[box], filled[box] = numbers, True
        if not filled.all():  # their sizes add up, so two of them overlap
            raise Unfit("its parts overlap; the folder is damaged")
        return whole


def read_distributed(folder: Path) -> dict[str, Any]:
    """The saved content, nested as it was: dicts of names to tensors. Values that are no tensors are left out.

    Raises Unfit where parts are missing, overlap or do not fill their tensor.
    """
    with open(folder / METADATA, "rb") as file:
        state = _fields(InertUnpickler(file, TABLE).load(), "Metadata")
    entries, places = state["state_dict_metadata"], state["storage_data"]
    places = {_place(index): _fields(info, "_StorageInfo") for index, info in places.items()}
    paths = state.get("planner_data") or {}
    content: dict[str, Any] = {}
    files = {_file_in(folder, info) for info in places.values()}
    if sum(info["length"] for info in places.values()) > sum(path.stat().st_size for path in files):
        raise Unfit("its parts overlap; it is damaged, or made to fill the memory")
    for name, entry in entries.items():
        if not _is(entry, "TensorStorageMetadata"):
            continue
        trail = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        table = content
        for step in trail[:-1]:
            table = table.setdefault(str(step), {})
        table[str(trail[-1])] = _tensor(folder, name, entry, places)
    return content


def _tensor(folder: Path, name: str, entry: Record, places: dict) -> PartedTensor:
    fields = _fields(entry, "TensorStorageMetadata")
    properties = _fields(fields["properties"], "TensorProperties")
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    shape = _sizes(fields["size"])
    if not isinstance(dtype, torch.dtype):
        raise Unfit(f"{name} has no type in {METADATA}")
    parts = []
    for chunk in fields["chunks"]:
        box = _fields(chunk, "ChunkStorageMetadata")
        start, size = _sizes(box["offsets"]), _sizes(box["sizes"])
        info = places.get((name, start))
        if (
            info is None
            or len(start) != len(shape)
            or any(a + b > n for a, b, n in zip(start, size, shape, strict=True))
        ):
            raise Unfit(f"{name}: its part at {list(start)} is missing or lies outside of it")
        parts.append(_Part(_file_in(folder, info), info["offset"], info["length"], start, size))
    if sum(math.prod(part.size) for part in parts) != math.prod(shape):
        raise Unfit(f"{name}: its {len(parts)} parts do not fill its shape {list(shape)}")
    if math.prod(shape) * dtype.itemsize > sum(part.length for part in parts):
        raise Unfit(f"{name}: its parts are too short for its shape {list(shape)}")
    return PartedTensor(dtype, shape, parts)


def _file_in(folder: Path, info: dict) -> Path:
    name, offset, length = info["relative_path"], info["offset"], info["length"]
    if info.get("transform_descriptors"):
        raise Unfit(f"{name} is compressed by extensions of torch, which are not read; save it without them")
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not all(type(n) is int and n >= 0 for n in (offset, length))
    ):
        raise Unfit(f"{METADATA} names a part outside of the folder")
    path = folder / name
    if not path.is_file():
        raise Unfit(f"its part {name} is missing; copy the whole folder")
    if offset + length > path.stat().st_size:
        raise Unfit(f"its part {name} is cut short; copy it again")
    return path


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Record) and value.origin.name == name


def _fields(value: Any, name: str) -> Any:
    if not _is(value, name) or not isinstance(value.state, dict | tuple) or not value.state:
        raise Unfit(f"{METADATA} holds no {name} where one was expected")
    return value.state


def _place(index: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(index, "MetadataIndex")
    offset = fields.get("offset")
    return fields["fqn"], None if offset is None else _sizes(offset)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise Unfit(f"{METADATA} holds an invalid shape")
    return value
