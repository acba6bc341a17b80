"""IMM: the number of an image within its class, and the release's decoder of three kinds of input."""

from __future__ import annotations

import torch
from torch import Tensor

from neon_imm.latents import VaeCodec


def numbers_in_class(labels: Tensor) -> Tensor:
    """int64 [N]: how many images of the same class come before each, for classes in order."""
    first = torch.searchsorted(labels, labels)
    return torch.arange(len(labels)) - first


def decode(codec: VaeCodec, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """uint8 [B, 3, H, W]. As in the release, three channels are pixels already, and 2C channels are mean | std and
    become a sample with `noise` first (unscaled like a latent, although they are raw)."""
    if x.shape[1] == 3 != codec.channels:
        return x
    if x.shape[1] == 2 * codec.channels:
        mean, std = x.chunk(2, dim=1)
        x = mean + noise * std
    return codec.decode(x)
