#!/usr/bin/env python3
"""Images and regret of the search against the official early-stopped grid, on 200 simulated noisy FID surfaces.

    python benchmarks/search.py

A surface over (w, guidance) has a diagonal valley: f = floor + 1/2 d^T R^T diag(k1, k2) R d with d the distance from
the optimum in units of (0.5, 0.5), the steep axis k1 in 0.3..3, the flat one k2 = k1 / (3..12), the valley at 25..65
degrees, optimum w in 0.5..1.9, guidance in 1.9..3.7. Four kinds, 50 each: `quadratic`; `skew`, with the rise beyond
the optimum up to twice as steep as before it; `banana`, whose valley bends; `wall`, which adds a steep wall at large
w (collapse). FID of n images = f + b / n + a common error of the seeds + an error of the setting: b = 1300 (1 + 0.03 z)
with z different at every setting, the common error N(0, 0.05 sqrt(10k / n)), the own error N(0, 0.006 sqrt(10k / n)).
Seeds are fixed; the table is the same on every machine.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from neon_core.pipeline.search import Axis, Budget, search
from neon_core.pipeline.sweep import early_stopped_grid

KINDS = ("quadratic", "skew", "banana", "wall")
WS = [round(0.2 * i, 1) for i in range(0, 13)]  # the union of the official VAR grids
GUIDANCES = [round(1.4 + 0.2 * i, 1) for i in range(0, 14)]
UNIT = 0.5
SEEDS = range(50, 100)  # the search was tuned on 0-49


class Surface:
    """One simulated FID surface and its measurements, whose errors belong to (setting, number of images)."""

    def __init__(self, kind: str, seed: int):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        self.kind, self.seed = kind, seed
        self.optimum = np.array([rng.uniform(0.5, 1.9), rng.uniform(1.9, 3.7)])
        self.floor = rng.uniform(1.0, 2.5)
        steep = rng.uniform(0.3, 3.0)
        self.curvature = np.array([steep, steep / rng.uniform(3, 12)])
        angle = np.deg2rad(rng.uniform(25, 65))
        flat = np.array([np.cos(angle), np.sin(angle)])  # more w wants more guidance
        self.axes = np.array([[-flat[1], flat[0]], flat])  # steep, flat
        self.skew = rng.uniform(0.3, 1.0) if kind == "skew" else 0.0
        self.bend = rng.uniform(-0.25, 0.25) if kind == "banana" else 0.0
        self.wall = rng.uniform(0.4, 1.2) if kind == "wall" else None

    def true(self, w: float, g: float) -> float:
        d = self.axes @ ((np.array([w, g]) - self.optimum) / UNIT)
        d[0] -= self.bend * d[1] ** 2
        k = self.curvature * np.where(d > 0, 1 + self.skew, 1.0)
        value = self.floor + 0.5 * float(k @ d**2)
        if self.wall is not None:
            value += 0.5 * max(0.0, (w - self.optimum[0]) / UNIT - self.wall) ** 3
        return value

    def measured(self, w: float, g: float, n: int) -> float:
        own = np.random.default_rng([self.seed, round(1e6 * w), round(1e6 * g), n])
        common = np.random.default_rng([self.seed, n])
        scale = np.sqrt(10_000 / n)
        bias = 1300 * (1 + 0.03 * own.standard_normal()) / n
        return self.true(w, g) + bias + 0.05 * scale * common.standard_normal() + 0.006 * scale * own.standard_normal()


def official(surface: Surface) -> tuple[int, float]:
    """(images, regret) of the early-stopped grid with 10,000 images a setting and tolerance 0.03."""
    asked = []

    def measure(_, w, g):
        asked.append((w, g))
        return surface.measured(w, g, 10_000)

    _, w, g = early_stopped_grid(["s"], WS, GUIDANCES, measure, 0.03)
    return 10_000 * len(asked), surface.true(w, g) - surface.floor


def ours(surface: Surface, budget: Budget) -> tuple[int, float]:
    """(images, regret) of `search`, started at the middle of the box."""
    w, g = Axis(0.0, 2.4, 1.0, 0.5), Axis(1.4, 4.0, 2.6, 0.5)
    found = search(lambda _, w, g, n: surface.measured(w, g, n), {"s": 1.0}, w, g, budget)
    return found.images, surface.true(found.best.w, found.best.guidance) - surface.floor


def main() -> dict:
    budget = Budget()
    head = (
        "surfaces",
        "grid images",
        "regret median",
        "95 %",
        "our images",
        "regret median",
        "95 %",
        "<= 0.02",
        "images",
    )
    print("{:>10} | {:>12} {:>14} {:>7} | {:>12} {:>14} {:>7} {:>8} | {:>7}".format(*head))
    everything = []
    for kind in (*KINDS, "all"):
        if kind == "all":
            rows = everything
        else:
            rows = [(*official(s), *ours(s, budget)) for s in (Surface(kind, seed) for seed in SEEDS)]
            everything += rows
        grid_images, grid_regret, images, regret = (np.array(column) for column in zip(*rows, strict=True))
        share = float(np.mean(regret <= 0.02))
        grid_side = f"{grid_images.mean():12.0f} {np.median(grid_regret):14.4f} {np.quantile(grid_regret, 0.95):7.3f}"
        our_side = f"{images.mean():12.0f} {np.median(regret):14.4f} {np.quantile(regret, 0.95):7.3f} {share:8.1%}"
        print(f"{kind:>10} | {grid_side} | {our_side} | {images.mean() / grid_images.mean():7.1%}")
    return {"share": share, "images": float(images.mean()), "grid_images": float(grid_images.mean())}


if __name__ == "__main__":
    main()
