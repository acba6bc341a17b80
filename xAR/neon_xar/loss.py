"""The flow-matching loss: all four cells in one masked pass, each at its own time, seeing the noisy cells before it.

Ren et al. 2025, section 3.3 ("noisy context learning"). Shapes: B images, C latent channels, g grid side; 4 cells of
T = g g / 4 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neon_xar.flow import time_index
from neon_xar.xar import CELLS, NULL_CLASS, to_cells


@dataclass(frozen=True)
class Randomness:
    """Everything random in the loss but the dropout masks."""

    drop: Tensor  # uniform on [0, 1), [B]: the label is dropped where this is below the net's label_drop_prob
    t: Tensor  # float32 times in (0, 1), [4, B]: cell, image
    noise: Tensor  # standard normal [4, B, T, C]: cell, image


def draw_randomness(shape: Sequence[int], generator: torch.Generator) -> Randomness:
    """For latents of `shape` [B, C, g, g], drawn on the generator's device; times are logit-normal."""
    (batch, channels, *grid), device = shape, generator.device
    drop = torch.rand(batch, generator=generator, device=device)
    normals = torch.randn(CELLS, batch, generator=generator, dtype=torch.float64, device=device)
    noise = torch.randn(CELLS, batch, math.prod(grid) // CELLS, channels, generator=generator, device=device)
    return Randomness(drop, logit_normal(normals), noise)


def logit_normal(normals: Tensor) -> Tensor:
    """float32 times 1 / (1 + exp(-normal)), computed in float64."""
    return (1.0 / (1.0 + torch.exp(-normals.double()))).float()


def drop_labels(labels: Tensor, drop: Tensor, probability: float) -> Tensor:
    """The labels [B], with the null class where drop [B] < probability."""
    return torch.where(drop < probability, NULL_CLASS, labels)


def noised(latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, eps - z), tokens [B, g g, C], for scaled latents [B, C, g, g]: x_t = (1 - t) z + t eps, t per cell."""
    z = to_cells(latents)  # [B, g g, C]
    eps = noise.transpose(0, 1).flatten(1, 2)  # [B, g g, C]
    t = t.t().repeat_interleave(noise.shape[2], dim=1)[..., None]  # [B, g g, 1]
    return (1.0 - t) * z + t * eps, eps - z


def velocity_loss(net: nn.Module, latents: Tensor, labels: Tensor, random: Randomness, drop_prob: float) -> Tensor:
    """Scalar: the squared error of the velocity, mean over channels, tokens and images. In float32 under autocast."""
    x, target = noised(latents, random.t, random.noise)
    v = net(x, drop_labels(labels, random.drop, drop_prob), time_index(random.t).t())  # [B, g g, C]
    return (v.float() - target).square().mean()
