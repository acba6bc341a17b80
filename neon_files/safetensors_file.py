"""Safetensors, tensor by tensor: merging 2.3 billion parameters takes the memory of the largest layer, no more."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from neon_files.atomic import atomic_path, remove_stale

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
    """A function of its own, so that no tensor outlives its turn."""
    assert (tensor.dtype, tuple(tensor.shape)) == layout[name], f"{name} is not as laid out"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):
        file.write(flat[start : start + _CHUNK].numpy())


def read_header(path: str | Path) -> tuple[list[str], dict[str, str]]:
    """(names in the order of the header, metadata). Raises ValueError where the file is no safetensors."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("shorter than 8 bytes")
        length = struct.unpack("<Q", start)[0]
        if length > 100_000_000:  # the format's own limit
            raise ValueError("header too long")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    return list(header), metadata
