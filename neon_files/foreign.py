"""Foreign bytes: JSON and .npy arrays, read within bounds. Nothing in them is executed."""

from __future__ import annotations

import json
import math
from typing import IO, Any

import numpy as np

from neon_files.errors import UserError

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def parse_json(data: bytes, source: str) -> Any:
    """The value of a JSON text. UserError naming `source` for other text, or too deep nesting."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply to be read; make it again") from error
    except ValueError as error:
        raise UserError(f"{source} is not a JSON text ({error}); make it again") from error


def npy_header(file: IO[bytes], num_bytes: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the order is Fortran's, dtype) of an .npy `file` of `num_bytes`, which is then at its numbers.

    ValueError where the header does not match the number of bytes, and for arrays of objects, whose data is a pickle.
    """
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"an .npy file of version {'.'.join(map(str, version))}")
    shape, fortran, dtype = _READERS[version](file)
    if dtype.hasobject:
        raise ValueError("an array of objects, not of plain numbers")
    needed, available = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if min(shape, default=1) < 0 or needed != available:
        raise ValueError(f"cut short or damaged: the shape {list(shape)} needs {needed} bytes, {available} are there")
    return shape, fortran, dtype


def npy_numbers(file: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> np.ndarray:
    """The array behind a header that `npy_header` returned."""
    buffer = bytearray(math.prod(shape) * dtype.itemsize)  # unlike bytes, it makes a writable array
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]  # as every binary file has
        raise ValueError("cut short")
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if fortran else "C")
