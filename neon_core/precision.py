"""How exactly float32 is computed on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_precision(allow_tf32: bool) -> Iterator[None]:
    """Full float32 (or TF32) in cuDNN's convolutions and cuBLAS' products inside the block."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9, which objects where the older flags are mixed in
        places, name = (backends.cudnn.conv, backends.cuda.matmul), "fp32_precision"
        value = "tf32" if allow_tf32 else "ieee"
    else:
        places, name, value = (backends.cudnn, backends.cuda.matmul), "allow_tf32", allow_tf32
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)
