"""A control: does the direction theta_syn - theta_base matter, or would any step of that length help?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def random_direction(theta_base: Mapping[str, Tensor], theta_syn: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """theta_base plus noise that is, tensor by tensor, as long as theta_syn - theta_base; in the base's dtypes.

    Merged in place of theta_syn with the same w it moves the base as far as Neon does, in no particular direction.
    Whole numbers, and tensors that are not finite (masks), stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, base in theta_base.items():
        if not base.is_floating_point() or not torch.isfinite(base).all():
            moved[name] = base.clone()
            continue
        exact = base.detach().cpu().double()
        length = torch.linalg.vector_norm(theta_syn[name].cpu().double() - exact)
        noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        moved[name] = (exact + noise * (length / torch.linalg.vector_norm(noise))).to(base.dtype)
    return moved
