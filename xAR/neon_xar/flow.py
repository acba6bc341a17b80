"""Flow matching on the path x_t = (1 - t) z + t eps, whose velocity is eps - z: times, integrators, guidance.

The integrators know no network: they take velocity(x, t, first), with float32 x and t rounded to float32 as the network
sees them, and keep their own state and times in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float, bool], Tensor]  # x float32, t, is this the first call? -> v like x
LAST_TIME = 0.04  # of the stochastic steps; one deterministic step leads from here to 0
MIN_STEPS = 3  # below, the original's cache goes wrong and its published settings say nothing


def sde_times(num_steps: int) -> Tensor:
    """float64 [num_steps + 1] on the CPU: the time of every network call, from 1 down to 0.04, and the final 0."""
    return torch.cat(
        [torch.linspace(1.0, LAST_TIME, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    )


def time_index(t: Tensor) -> Tensor:
    """The integer that the network is told: trunc(1000 t), int64, with t and product in float32."""
    return (t.float() * 1000.0).long()


def cell_guidance(cfg: float, cell: int, cells: int = 4) -> float:
    """Guidance of one cell: a ramp from 1 for the first to `cfg` for the last. 1 or less means none at all."""
    return 1.0 + (cfg - 1.0) * cell / (cells - 1)


def guide(v: Tensor, g: float) -> Tensor:
    """v [2B, ...], conditional rows first, then unconditional -> v_u + g (v_c - v_u) in float64, [B, ...].

    The Euler-Maruyama drift x + (2 - t) v is affine in v with the same x in both halves, so guiding v guides the drift.
    """
    conditional, unconditional = v.double().chunk(2)
    return unconditional + g * (conditional - unconditional)


def euler_maruyama(velocity: Velocity, x: Tensor, num_steps: int, randn: Callable[[], Tensor]) -> Tensor:
    """The reverse SDE with diffusion 2t, from noise x at t = 1: float64, like x. `randn` gives float64 noise like x.

    num_steps network calls: num_steps - 1 noisy steps to t = 0.04 and one without noise to 0.
    """
    times = sde_times(num_steps).tolist()
    x = x.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt = t_next - t
        eps = randn() if i < num_steps - 1 else None  # drawn before the network runs, which may draw too
        v = velocity(x.float(), _float32(t), i == 0).double()
        score = -(x + (1.0 - t) * v) / t
        x = x + (v - t * score) * dt
        if eps is not None:
            x = x + math.sqrt(2.0 * t) * math.sqrt(-dt) * eps
    return x


def _float32(t: float) -> float:
    return torch.tensor(t, dtype=torch.float32).item()
