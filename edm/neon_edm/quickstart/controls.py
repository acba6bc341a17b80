"""The controls: is it the direction theta_syn - theta_base that helps, or any step of that length, or more training?

The second control needs no code of its own: it is `self_train` with the fine-tune's settings on the real digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_direction(theta_base: dict[str, Tensor], theta_syn: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """theta_base plus noise that is, tensor by tensor, as long as theta_syn - theta_base.

    Merged in place of theta_syn with the same w, it moves the base as far as Neon does, but not in Neon's direction.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, base in theta_base.items():
        length = torch.linalg.vector_norm(theta_syn[name].double() - base.double())
        noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        moved[name] = (base.double() + noise * (length / torch.linalg.vector_norm(noise))).to(base.dtype)
    return moved
