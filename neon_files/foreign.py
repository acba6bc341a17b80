"""Bytes that others made: JSON and .npy arrays, read within bounds. Nothing in them is executed."""

from __future__ import annotations

import json
import math
from typing import Any, BinaryIO

import numpy as np

from neon_files.errors import UserError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def parse_json(data: bytes, source: str) -> Any:
    """The value of a JSON text. UserError naming `source` for text that is no JSON, or is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply to be read; make it again") from error
    except ValueError as error:
        raise UserError(f"{source} is not a JSON text ({error}); make it again") from error


def read_npy(file: BinaryIO, num_bytes: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The array of an .npy `file` of `num_bytes`; its header is believed only as far as there are bytes for it.

    Raises ValueError for anything but plain numbers, for a file cut short, and for another shape than `shape`.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an .npy file of version {'.'.join(map(str, version))}")
    found, fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of {dtype}, not of plain numbers")
    if shape is not None and found != shape:
        raise ValueError(f"the shape is {list(found)}, expected {list(shape)}")
    wanted = math.prod(found) * dtype.itemsize
    if min(found, default=1) < 0 or wanted > num_bytes - file.tell():
        raise ValueError(f"cut short: {wanted} bytes promised for the shape {list(found)}, fewer there")
    buffer = bytearray(wanted)  # which, unlike bytes, makes an array that can be written to
    if file.readinto(buffer) != wanted:
        raise ValueError("cut short")
    return np.frombuffer(buffer, dtype).reshape(found, order="F" if fortran else "C")
