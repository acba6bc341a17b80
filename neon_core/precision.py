"""How exactly float32 is computed on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32 = ("none", "conv", "all")  # nowhere, in cuDNN's convolutions (PyTorch's default), in cuBLAS' products too


@contextmanager
def float32_precision(tf32: str) -> Iterator[None]:
    """Inside the block float32 is rounded to TF32 in these places, one of `TF32`, and nowhere else."""
    wanted = {"none": (False, False), "conv": (True, False), "all": (True, True)}[tf32]
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9, which objects where the older flags are mixed in
        places, name = (backends.cudnn.conv, backends.cuda.matmul), "fp32_precision"
        values = ["tf32" if allowed else "ieee" for allowed in wanted]
    else:
        places, name, values = (backends.cudnn, backends.cuda.matmul), "allow_tf32", list(wanted)
    before = [getattr(place, name) for place in places]
    try:
        for place, value in zip(places, values, strict=True):
            setattr(place, name, value)
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)
