"""Weights and inputs that need no file and no random generator of torch, whose numbers differ from version to version.

Every parameter of a model is filled from its own name, so two networks that agree on names and shapes are equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def normal(name: str, shape: Sequence[int]) -> np.ndarray:
    """float64 of `shape`, standard normal from PCG64 seeded by the first 8 bytes (little endian) of sha256(name)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.asarray(np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape)), dtype=np.float64)


def tensor_for(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 of `shape`, a pure function of (`name`, `shape`): x = `normal`.

    Two or more dimensions: x / sqrt(prod(shape[1:])); one dimension (or none) and a name ending in "weight":
    1 + 0.1 x; any other: 0.1 x.
    """
    x = normal(name, shape)
    if len(shape) >= 2:
        x = x / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        x = 1.0 + 0.1 * x
    else:
        x = 0.1 * x
    return x.astype(np.float32)


@torch.no_grad()
def fill(module: Module) -> Module:
    """Overwrite every parameter of `module` in place; buffers keep their values."""
    for name, parameter in module.named_parameters():
        values = torch.from_numpy(tensor_for(name, tuple(parameter.shape)))
        parameter.copy_(values.to(parameter.dtype).reshape(parameter.shape))
    return module


class Draws:
    """Standard normal numbers in a fixed order, [batch, *shape] on `device`, in the place of `PerImageRandom.randn`."""

    def __init__(self, batch: int, device: torch.device):
        self.batch, self.device, self.count = batch, device, 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.count += 1
        return torch.from_numpy(normal(f"draw {self.count}", (self.batch, *shape))).to(self.device, dtype)


def gradient_norms(loss: Tensor, net: nn.Module) -> Tensor:
    """[n]: the norm of the gradient of each parameter that the loss depends on."""
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.stack([gradient.norm() for gradient in gradients if gradient is not None])
