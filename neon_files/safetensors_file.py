"""Safetensors, tensor by tensor: merging 2.3 billion parameters takes only the memory of the largest layer."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from neon_files.atomic import atomic_path, remove_stale
from neon_files.guard import AGAIN, Unfit, reading
from neon_files.lazy_tensor import LazyTensor, Storage
from neon_files.torch_file import map_file, part_of

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPE_NAMES[torch.float8_e8m0fnu] = "F8_E8M0"
_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's limit
_BROKEN = f"not a whole safetensors file; {AGAIN}"
_CHUNK = 1 << 24

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape


def write_safetensors(
    path: str | Path, layout: Layout, load: Callable[[str], Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `load(name)` for every name of `layout`, one at a time, atomically.

    The header keeps the order of `layout`; the data are sorted by size of the number, widest first, so that every
    tensor starts at a multiple of its number's size and can be mapped. Raises UserError as `atomic_path` does.
    """
    path = Path(path)
    in_file = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    offsets, end = {}, 0
    for name in in_file:
        dtype, shape = layout[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        offsets[name] = [begin, end]
    header: dict = {"__metadata__": metadata} if metadata else {}
    for name, (dtype, shape) in layout.items():
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets[name]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in in_file:
            _append(file, load(name), name, layout)


def _append(file: BinaryIO, tensor: Tensor, name: str, layout: Layout) -> None:
    """A separate function, so that each tensor is freed before the next is loaded."""
    assert (tensor.dtype, tuple(tensor.shape)) == layout[name], f"{name} is not as laid out"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):
        file.write(flat[start : start + _CHUNK].numpy())


def read_header(path: str | Path) -> tuple[list[str], dict[str, str]]:
    """(names in the order of the header, metadata). Raises UserError where the file is no safetensors."""
    with reading(path):
        header, metadata, _ = _read_header(path)
        return list(header), metadata


def open_tensors(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(name -> tensor, mapped when it is loaded, in the order of the header; metadata). Raises Unfit."""
    header, metadata, start = _read_header(path)
    size = os.path.getsize(path)
    whole = cache(lambda: map_file(path))
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        dtype, shape = _TYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise Unfit(f"{name} has the type {str(entry.get('dtype'))[:40]!r}, which cannot be read")
        if (
            not isinstance(shape, list)
            or len(shape) > 64
            or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
        ):
            raise Unfit(f"{_BROKEN} (the shape of {name} is invalid)")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if [begin - start, end - start] != _offsets(name, entry):
            raise Unfit(f"{_BROKEN} (the place of {name} does not follow from the others' shapes)")
        tensors[name] = _mapped(whole, begin, end, dtype, tuple(shape))
    if end != size:
        raise Unfit(f"{_BROKEN} ({size:,} bytes, its header describes {end:,})")
    return {name: tensors[name] for name in header}, metadata


def _mapped(whole: Callable, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> LazyTensor:
    storage = Storage(dtype, end - begin, lambda: part_of(whole(), begin, end, dtype.itemsize))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return LazyTensor(storage, 0, shape, tuple(strides))


def _offsets(name: str, entry: dict) -> list[int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise Unfit(f"{_BROKEN} ({name} has no place in it)")
    return offsets


def _read_header(path: str | Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """(name -> its entry, metadata, where the numbers begin)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise Unfit(f"{_BROKEN} (a header of {length:,} bytes in a file of {size:,})")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{_BROKEN} ({type(error).__name__} in its header)") from error
    if not isinstance(header, dict):
        raise Unfit(f"{_BROKEN} (its header is no table)")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Unfit(f"{_BROKEN} (its metadata are not text)")
    return header, metadata, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table
