"""The precision of a network's arithmetic: float32 on a GPU, and weights in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neon_files.errors import UserError

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TF32 = ("none", "conv", "all")  # nowhere, in cuDNN's convolutions (PyTorch's default), in cuBLAS' products too


@contextmanager
def float32_precision(tf32: str) -> Iterator[None]:
    """Inside the block float32 is rounded to TF32 in these places, one of `TF32`, and nowhere else."""
    allowed = {"none": (False, False), "conv": (True, False), "all": (True, True)}[tf32]
    switches = float32_switches()
    before = [getattr(place, name) for place, name in switches]
    try:
        for (place, name), on in zip(switches, allowed, strict=True):
            setattr(place, name, on if name == "allow_tf32" else "tf32" if on else "ieee")
        yield
    finally:
        for (place, name), old in zip(switches, before, strict=True):
            setattr(place, name, old)


def float32_switches() -> list[tuple[Any, str]]:
    """Where PyTorch keeps what convolutions and matrix products do with float32: (object, name of its attribute)."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9, which objects where the older names are mixed in
        return [(backends.cudnn.conv, "fp32_precision"), (backends.cuda.matmul, "fp32_precision")]
    return [(backends.cudnn, "allow_tf32"), (backends.cuda.matmul, "allow_tf32")]


def check_precision(precision: str, flag: str = "--precision", device: torch.device | None = None) -> None:
    """UserError unless it is "auto" or one of PRECISIONS, and one that `device` computes."""
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"{flag} {precision}: choose auto, {', '.join(PRECISIONS)}")
    on_gpu = device is not None and device.type == "cuda"
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{flag} bf16: this GPU ({name}) does not compute bfloat16; choose fp16 or fp32")


def half_on_gpu(device: torch.device, precision: str) -> str:
    """`precision`, one of PRECISIONS; "auto": fp16 on CUDA, elsewhere fp32."""
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Inside, products have this precision: see `half_on_gpu`."""
    precision = half_on_gpu(device, precision)
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])


@contextmanager
def frozen_in(device: torch.device, precision: str, module: nn.Module) -> Iterator[None]:
    """Inside, the products of the frozen `module` have this precision, whatever region the caller is in, and its
    weights are held in it: see `half_on_gpu`, `weights_as`."""
    dtype = {**PRECISIONS, "fp32": None}[half_on_gpu(device, precision)]
    with torch.autocast(device.type, dtype, dtype is not None), weights_as(dtype, product_layers(module)):
        yield


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """The dtype of autocast's matrix products on such a device; None where it is off."""
    kind = torch.device(device).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def product_layers(net: nn.Module) -> list[nn.Module]:
    """Its linear layers and convolutions, whose weights autocast converts."""
    return [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _converted(name: str, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


@contextmanager
def weights_as(
    dtype: torch.dtype | None, layers: Iterable[nn.Module], convert: Callable[..., list[Tensor]] = _converted
) -> Iterator[None]:
    """The layers' direct parameters and buffers have `dtype` inside the block (None: unchanged), for a sampling call:
    autocast keeps its conversions only where a gradient is required, and converts a frozen weight at every use.
    `convert`(name, tensors, dtype) may keep them at one place for later calls."""
    tensors = [t for layer in layers for t in (*layer.parameters(False), *layer.buffers(False))] if dtype else []
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, data in zip(tensors, convert("weights", before, dtype), strict=True):
            tensor.data = data
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
