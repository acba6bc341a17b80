"""xAR: the epoch-wise schedule, and the deterministic integrator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from neon_xar.flow import Velocity


def official_lr(lr: float, min_lr: float, warmup_epochs: float, epoch: float) -> float:
    """Linear from 0, then `lr` up to epoch 600, then a cosine to `min_lr` at 800 that nothing stops from rising again.

    The published runs end inside the warm-up, which makes it a plain linear ramp.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch < 600:
        return lr
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - 600) / 200))


@dataclass(frozen=True)
class OfficialSchedule:
    """`official_lr` over images seen, as a factor of the peak."""

    warmup_epochs: float
    epoch_images: int  # what one epoch counts: steps per epoch * batch size, an incomplete last batch dropped
    min_factor: float = 0.0  # min_lr / lr

    def __call__(self, images_seen: int) -> float:
        return official_lr(1.0, self.min_factor, self.warmup_epochs, images_seen / self.epoch_images)


def ode_times(num_steps: int) -> Tensor:
    """float64 [num_steps + 1] on the CPU: equal steps from 1 to 0."""
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)


def euler(velocity: Velocity, x: Tensor, num_steps: int) -> Tensor:
    """The probability-flow ODE by Euler's method, from noise x at t = 1 to 0: float64, like x."""
    times = ode_times(num_steps).tolist()
    x = x.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + velocity(x.float(), float(np.float32(t)), i == 0).double() * (t_next - t)
    return x
