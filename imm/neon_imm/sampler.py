"""Sampling in a few steps: time grids, pushforward and restart (Zhou, Ermon, Song 2025, sec. 5 of IMM)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neon_files.errors import UserError
from neon_imm.precond import IMMPrecond, NoiseSchedule

RHO = 7  # of the edm grid
DISCRETIZATIONS = ("uniform", "edm", "mid_nt")

# The published names; they carry the original guidance 1.5. The README's evaluation is 8 steps at 1.8.
PRESETS: dict[str, dict] = {
    "1_steps_cfg1.5_pushforward_uniform": {"num_steps": 1, "cfg": 1.5},
    "2_steps_cfg1.5_pushforward_uniform": {"num_steps": 2, "cfg": 1.5},
    "4_steps_cfg1.5_pushforward_uniform": {"num_steps": 4, "cfg": 1.5},
    "8_steps_cfg1.5_pushforward_uniform": {"num_steps": 8, "cfg": 1.5},
    "1_step": {"discretization": "mid_nt", "mid_nt": (), "cfg": None},  # CIFAR-10
    "2_steps": {"discretization": "mid_nt", "mid_nt": (1.4,), "cfg": None},  # CIFAR-10
    "2_step": {"discretization": "mid_nt", "mid_nt": (1.4,), "cfg": None},  # as the training spells it
}


def time_grid(
    schedule: NoiseSchedule,
    discretization: str = "uniform",
    num_steps: int = 8,
    mid_nt: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[num_steps + 1] times from T down to eps.

    uniform: equal steps in t. edm: equal steps in nt^(1/7). mid_nt: T, the times of the given noise-to-signal ratios,
    eps; `num_steps` is not used. The original scripts compute the grid in the dtype of the sample: float32 in Neon's
    evaluation, float64 in the IMM release.
    """
    ends = torch.tensor([schedule.T, schedule.eps], dtype=dtype)
    if discretization == "uniform":
        grid = torch.linspace(schedule.T, schedule.eps, num_steps + 1, dtype=dtype)
    elif discretization == "edm":
        # The ends are recomputed in `dtype`; their roots are Python floats, the interpolation is in `dtype` again.
        first, last = (schedule.nt(end).item() ** (1 / RHO) for end in ends)
        i = torch.arange(num_steps + 1, dtype=dtype)
        grid = schedule.nt_to_t((first + i / num_steps * (last - first)) ** RHO)
    elif discretization == "mid_nt":
        middle = schedule.nt_to_t(torch.tensor([float(nt) for nt in mid_nt], dtype=torch.float32))
        grid = torch.cat([ends[:1], middle.to(dtype), ends[1:]])
    else:
        raise UserError(f"discretization {discretization!r}: known are {', '.join(DISCRETIZATIONS)}")
    return grid.to(device)


def passes_per_image(settings: Mapping[str, Any]) -> int:
    """One per step, two where guidance needs the unconditional one too."""
    steps = settings.get("num_steps") or 1 + len(settings.get("mid_nt", ()))
    return steps * (1 if settings.get("cfg") in (None, 1) else 2)


@torch.no_grad()
def pushforward(
    net: IMMPrecond, latents: Tensor, grid: Tensor, labels: Tensor | None = None, cfg: float | None = None
) -> Tensor:
    """The sample at eps: x(t_{i+1}) = f(x(t_i), t_i, t_{i+1}) along the grid.

    `latents` [B, C, h, w] is noise of standard deviation sigma_data. It is taken to the grid's dtype, as is the result.
    """
    x = latents.to(grid.dtype)
    with net.frozen():
        for t, t_next in itertools.pairwise(grid):
            x = net.cfg_forward(x, t, t_next, labels, cfg)
    return x


@torch.no_grad()
def restart(
    net: IMMPrecond,
    latents: Tensor,
    grid: Tensor,
    noises: Sequence[Tensor],
    labels: Tensor | None = None,
    cfg: float | None = None,
) -> Tensor:
    """The sample at eps, reached anew from every time of the grid: t_i -> eps, then back to t_{i+1} with fresh noise.

    `noises`: standard normal [B, C, h, w], one for each step but the last; scaled by sigma_data here.
    """
    x = latents.to(grid.dtype)
    with net.frozen():
        for i, t in enumerate(grid[:-1]):
            x = net.cfg_forward(x, t, grid[-1], labels, cfg)
            if i < len(grid) - 2:
                x = net.add_noise(x, grid[i + 1], noises[i].to(x.dtype) * net.sigma_data)
    return x
