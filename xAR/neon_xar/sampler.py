"""Cell by cell: labels and noise -> latents. Ren et al. 2025, section 3; the guidance ramp over cells is the code's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from neon_core.precision import autocast_dtype, product_layers, weights_as
from neon_xar.flow import MIN_STEPS, cell_guidance, euler_maruyama, guide, sde_times, time_index
from neon_xar.xar import CELLS, NULL_CLASS, XAR, from_cells

Draw = Callable[..., Tensor]  # draw(*shape, dtype=...) -> standard normal [B, *shape] on the network's device


def passes_per_image(settings: Mapping[str, Any]) -> int:
    """Per step, over the four cells: with and, where guidance needs it, without the class. The first never needs it."""
    return (7 if settings["cfg"] > 1 else 4) * settings["flow_steps"]


@torch.no_grad()
def sample_latents(net: XAR, labels: Tensor, num_steps: int, cfg: float, draw: Draw) -> Tensor:
    """Scaled latents, float32 [B, C, g, g], for labels int64 [B].

    `draw` is called in a fixed order: per cell of T tokens the initial noise [T, C] in float32, then before every
    step but the last its noise [T, C] in float64. Raises ValueError for num_steps < 3.
    """
    if num_steps < MIN_STEPS:
        raise ValueError(f"num_steps {num_steps}: at least {MIN_STEPS} steps are needed")
    with weights_as(autocast_dtype(labels.device), product_layers(net), net.calls.hold):
        return from_cells(torch.cat(_cells(net, labels, num_steps, cfg, draw), dim=1))


def _cells(net: XAR, labels: Tensor, num_steps: int, cfg: float, draw: Draw) -> list[Tensor]:
    """The tokens of the four cells, float32 [B, T, C] each."""
    B, shape = len(labels), (net.cell_tokens, net.channels)
    k = torch.cat([time_index(sde_times(num_steps)[:-1]), torch.zeros(1, dtype=torch.int64)])
    times = net.time_embed(k.to(labels.device))  # [n + 1, D]: one embedding per step, for all cells; the last is t = 0
    classes = net.class_emb(labels)[:, None]  # [B, 1, D]
    if cfg > 1:
        nothing = net.class_emb(labels.new_tensor([NULL_CLASS]))[:, None].expand_as(classes)
        both = torch.cat([classes, nothing])  # [2B, 1, D]
    else:
        both = classes  # unguided: no unconditional half in any cell
    cache = net.new_cache(len(both))
    cells: list[Tensor] = []
    for cell in range(CELLS):
        g = cell_guidance(cfg, cell)
        # The first cell is never guided and leaves nothing in the cache, so it needs no unconditional half either:
        # the second cell's first call encodes the finished first cell for both halves.
        condition = both if cell > 0 else classes
        x = draw(*shape, dtype=torch.float32)
        steps = iter(range(num_steps))

        def velocity(x: Tensor, t: float, first: bool, cell=cell, g=g, condition=condition, steps=steps) -> Tensor:
            now = condition + times[next(steps)]  # [B or 2B, 1, D]
            x = x.repeat(len(condition) // B, 1, 1)  # [B or 2B, T, C]
            if cell > 0 and first:  # the cell before, now clean, is encoded once, at time 0
                context = cells[-1].repeat(len(condition) // B, 1, 1)
                x = torch.cat([context, x], dim=1)  # [., 2T, C]
                now = torch.cat([condition + times[-1], now], dim=1)  # [., 2, D]
            v = net.velocity(x, now, cell, cache if cell > 0 else None)[:, -net.cell_tokens :]
            return guide(v, g) if len(condition) > B else v

        cells.append(euler_maruyama(velocity, x, num_steps, lambda: draw(*shape, dtype=torch.float64)).float())
    return cells
