#!/usr/bin/env python3
"""Images and regret of the search against the official early-stopped grids, on simulated noisy FID surfaces.

    python benchmarks/search.py                      # the tables of docs/search.md
    python benchmarks/search.py --seeds 0-49         # the surfaces that the constants of the search were chosen on
    python benchmarks/search.py --digits runs/search_digits      # and part (ii), search_digits.py: real sampling

**With guidance.** A surface over (w, guidance) has a diagonal valley: f = floor + 1/2 d^T R^T diag(k1, k2) R d with d
the distance from the optimum in units of (0.5, 0.5), the steep axis k1 in 0.3..3, the flat one k2 = k1 / (3..12), the
valley at 25..65 degrees, optimum w in 0.5..1.9, guidance in 1.9..3.7. Four kinds, 50 each: `quadratic`; `skew`, with
the rise beyond the optimum up to twice as steep as before it; `banana`, whose valley bends; `wall`, which adds a steep
wall at large w (collapse). Beside the 200, `turned` is a quadratic whose valley may run in any direction.

**With further settings of the sampler.** One or two more axes of the same units, optimum in 0.3..2.3 of a box 0..2.6.
There is one steep direction, guidance against w as above with a part of up to 1 of each further axis, and across it a
sheet of flat ones, each with a curvature of its own; in `banana` the sheet bends along each of them, in `turned` its
direction is any. The grid has seven values of each further axis, within the loop over guidance.

**Without guidance.** f = floor + k/2 d^2 with k in 0.2..2 and the optimum at w 0.4..1.8; `skew` and `wall` as above.

**Snapshots.** Four snapshots of one fine-tune, with steps of length 1, 1.6, 2.1 and 2.5: the same kind of valley, its
optimum at w |Delta| = c (1 + 0.1 z) and within N(0, 0.1) of a common guidance, curvatures within 10 %, floors
a U over the snapshots, whose lowest is the second or the third, 0.02..0.15 deep per step.

**Measurements.** FID of n images = f + b / n + an error common to the seeds + an error of the setting. b belongs to the
setting: 1300 (1 + 0.03 z). Both errors are means over blocks of 500 images, so the first n images of a longer
measurement carry their error into it; at 10,000 images they are N(0, 0.05) and N(0, 0.006). Everything is seeded: the
tables are the same on every machine.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import click
import numpy as np

from neon_run.flags import parse_seed_list
from neon_run.search.quick import Axis, Budget, search
from neon_run.search.sweep import early_stopped_grid

KINDS = ("quadratic", "skew", "banana", "wall")
ONE_AXIS_KINDS = ("quadratic", "skew", "wall")
WS = [round(0.2 * i, 1) for i in range(0, 13)]  # the union of the official VAR grids
GUIDANCES = [round(1.4 + 0.2 * i, 1) for i in range(0, 14)]
ONE_AXIS_WS = [0.25 * i for i in range(9)]  # the official EDM grid
W, GUIDANCE, ONE_AXIS_W = Axis(0.0, 2.4, 1.0, 0.5), Axis(1.4, 4.0, 2.6, 0.5), Axis(0.0, 3.0, 1.0, 0.5)
FURTHER, FURTHER_VALUES = Axis(0.0, 2.6, 1.3, 0.5), [round(0.4 * i, 1) for i in range(7)]
LENGTHS = {"a": 1.0, "b": 1.6, "c": 2.1, "d": 2.5}  # |theta_syn - theta_base| of the four snapshots
UNIT, BLOCK = 0.5, 500
GOOD = 0.02  # regret


class Noise:
    """What is added to the true FID; `measured(setting, n)` grows with n as real statistics do."""

    def __init__(self, seed: int, snapshot: int = 0):
        self.seed, self.snapshot = seed, snapshot

    def __call__(self, setting: tuple[float, ...], n: int) -> float:
        key = [round(1e6 * value) for value in setting]
        own, common = np.random.default_rng([self.seed, self.snapshot, *key]), np.random.default_rng([self.seed])
        bias, blocks = 1300 * (1 + 0.03 * own.standard_normal()) / n, max(n // BLOCK, 1)
        error = 0.006 * own.standard_normal(blocks).mean() + 0.05 * common.standard_normal(blocks).mean()
        return bias + error * (10_000 / BLOCK) ** 0.5


class Valley:
    """A surface over (w, guidance)."""

    def __init__(self, kind: str, seed: int):
        shape = KINDS.index(kind) if kind in KINDS else len(KINDS)
        rng = np.random.default_rng([shape, seed])
        self.noise = Noise(seed)
        self.optimum = np.array([rng.uniform(0.5, 1.9), rng.uniform(1.9, 3.7)])
        self.floor = rng.uniform(1.0, 2.5)
        steep = rng.uniform(0.3, 3.0)
        self.curvature = np.array([steep, steep / rng.uniform(3, 12)])
        angle = np.deg2rad(rng.uniform(-90, 90) if kind == "turned" else rng.uniform(25, 65))
        flat = np.array([np.cos(angle), np.sin(angle)])  # more w wants more guidance
        self.axes = np.array([[-flat[1], flat[0]], flat])  # steep, flat
        self.skew = rng.uniform(0.3, 1.0) if kind == "skew" else 0.0
        self.bend = rng.uniform(-0.25, 0.25) if kind == "banana" else 0.0
        self.wall = rng.uniform(0.4, 1.2) if kind == "wall" else None

    def true(self, w: float, g: float) -> float:
        d = self.axes @ ((np.array([w, g]) - self.optimum) / UNIT)
        d[0] -= self.bend * d[1] ** 2
        k = self.curvature * np.where(d > 0, 1 + self.skew, 1.0)
        return self.floor + 0.5 * float(k @ d**2) + _wall(self.wall, (w - self.optimum[0]) / UNIT)

    def measured(self, w: float, g: float, n: int) -> float:
        return self.true(w, g) + self.noise((w, g), n)

    def official(self) -> tuple[int, float]:
        """(images, regret) of the early-stopped grid with 10,000 images a setting and tolerance 0.03."""
        asked, measure = _counting(lambda _, w, settings: self.measured(w, settings["g"], 10_000))
        _, w, settings = early_stopped_grid(["s"], WS, {"g": GUIDANCES}, measure, 0.03)
        return 10_000 * len(asked), self.true(w, settings["g"]) - self.floor

    def ours(self, budget: Budget | None = None) -> tuple[int, float]:
        """(images, regret) of `search`, started at the middle of the box."""
        measure = lambda _, w, settings, n: self.measured(w, settings["g"], n)  # noqa: E731
        found = search(measure, {"s": 1.0}, W, {"g": GUIDANCE}, budget)
        return found.images, self.true(found.best.w, found.best.settings["g"]) - self.floor


class Sheet:
    """A surface over w, guidance and `num_further` other settings of the sampler."""

    num_further = 1

    def __init__(self, kind: str, seed: int):
        n, shape = self.num_further, KINDS.index(kind) if kind in KINDS else len(KINDS)
        rng = np.random.default_rng([30 + n, shape, seed])
        self.noise = Noise(seed)
        self.optimum = np.array([rng.uniform(0.5, 1.9), rng.uniform(1.9, 3.7), *rng.uniform(0.3, 2.3, n)])
        self.floor = rng.uniform(1.0, 2.5)
        steep = rng.uniform(0.3, 3.0)
        self.curvature = np.array([steep, *(steep / rng.uniform(3, 12, n + 1))])
        angle = np.deg2rad(rng.uniform(25, 65))
        normal = np.array([-np.sin(angle), np.cos(angle), *rng.uniform(-1, 1, n)])
        if kind == "turned":
            normal = rng.standard_normal(n + 2)
        axes, _ = np.linalg.qr(np.column_stack([normal, rng.standard_normal((n + 2, n + 1))]))
        self.axes = axes.T  # steep, then flat
        self.axes[0] = normal / np.linalg.norm(normal)  # with its sign: more guidance lies above
        self.skew = rng.uniform(0.3, 1.0) if kind == "skew" else 0.0
        self.bend = rng.uniform(-0.25, 0.25, n + 1) if kind == "banana" else np.zeros(n + 1)
        self.wall = rng.uniform(0.4, 1.2) if kind == "wall" else None

    def true(self, w: float, settings: dict[str, float]) -> float:
        d = self.axes @ ((np.array([w, *settings.values()]) - self.optimum) / UNIT)
        d[0] -= self.bend @ d[1:] ** 2
        k = self.curvature * np.where(d > 0, 1 + self.skew, 1.0)
        return self.floor + 0.5 * float(k @ d**2) + _wall(self.wall, (w - self.optimum[0]) / UNIT)

    def measured(self, w: float, settings: dict[str, float], n: int) -> float:
        return self.true(w, settings) + self.noise((w, *settings.values()), n)

    def official(self) -> tuple[int, float]:
        grid = {"g": GUIDANCES, **{f"further {i}": FURTHER_VALUES for i in range(self.num_further)}}
        asked, measure = _counting(lambda _, w, settings: self.measured(w, settings, 10_000))
        _, w, settings = early_stopped_grid(["s"], WS, grid, measure, 0.03)
        return 10_000 * len(asked), self.true(w, settings) - self.floor

    def ours(self, budget: Budget | None = None) -> tuple[int, float]:
        axes = {"g": GUIDANCE, **{f"further {i}": FURTHER for i in range(self.num_further)}}
        found = search(lambda _, w, settings, n: self.measured(w, settings, n), {"s": 1.0}, W, axes, budget)
        return found.images, self.true(found.best.w, found.best.settings) - self.floor


class WiderSheet(Sheet):
    num_further = 2


class Curve:
    """A surface over w alone."""

    def __init__(self, kind: str, seed: int):
        rng = np.random.default_rng([10 + ONE_AXIS_KINDS.index(kind), seed])
        self.noise = Noise(seed)
        self.optimum, self.floor, self.curvature = rng.uniform(0.4, 1.8), rng.uniform(1.0, 2.5), rng.uniform(0.2, 2.0)
        self.skew = rng.uniform(0.3, 1.0) if kind == "skew" else 0.0
        self.wall = rng.uniform(0.4, 1.2) if kind == "wall" else None

    def true(self, w: float) -> float:
        d = (w - self.optimum) / UNIT
        return self.floor + 0.5 * self.curvature * (1 + self.skew * (d > 0)) * d**2 + _wall(self.wall, d)

    def official(self) -> tuple[int, float]:
        asked, measure = _counting(lambda _, w, __: self.true(w) + self.noise((w,), 10_000))
        _, w, _ = early_stopped_grid(["s"], ONE_AXIS_WS, {}, measure, 0.03)
        return 10_000 * len(asked), self.true(w) - self.floor

    def ours(self, budget: Budget | None = None) -> tuple[int, float]:
        measure = lambda _, w, __, n: self.true(w) + self.noise((w,), n)  # noqa: E731
        found = search(measure, {"s": 1.0}, ONE_AXIS_W, {}, budget)
        return found.images, self.true(found.best.w) - self.floor


class Snapshots:
    """Four snapshots of one fine-tune, each with a valley of its own; regret is against the lowest floor of all."""

    def __init__(self, kind: str, seed: int):
        rng = np.random.default_rng([20, KINDS.index(kind), seed])
        lowest, depth = rng.uniform(0.5, 2.5), rng.uniform(0.02, 0.15)
        self.of: dict[str, Valley] = {}
        for number, name in enumerate(LENGTHS):
            valley = Valley(kind, seed)
            valley.noise = Noise(seed, number)
            u = valley.optimum[0] * (1 + 0.1 * rng.standard_normal())
            valley.optimum = np.array([u, valley.optimum[1] + 0.1 * rng.standard_normal()])
            valley.curvature = valley.curvature * np.exp(0.1 * rng.standard_normal(2))
            valley.floor += depth * (number - lowest) ** 2
            self.of[name] = valley
        self.floor = min(valley.floor for valley in self.of.values())

    def true(self, name: str, w: float, g: float) -> float:
        return self.of[name].true(w * LENGTHS[name] / LENGTHS["d"], g)

    def measured(self, name: str, w: float, g: float, n: int) -> float:
        return self.true(name, w, g) + self.of[name].noise((w, g), n)

    def official(self) -> tuple[int, float]:
        """The grid in each snapshot; w in units of the snapshot's own step, so that no optimum lies outside it."""
        of_length = lambda s, u: u * LENGTHS["d"] / LENGTHS[s]  # noqa: E731
        asked, measure = _counting(lambda s, u, settings: self.measured(s, of_length(s, u), settings["g"], 10_000))
        s, u, settings = early_stopped_grid(LENGTHS, WS, {"g": GUIDANCES}, measure, 0.03)
        return 10_000 * len(asked), self.of[s].true(u, settings["g"]) - self.floor

    def ours(self, budget: Budget | None = None) -> tuple[int, float]:
        """The longest first, as `neon reproduce` does."""
        lengths = dict(reversed(LENGTHS.items()))
        measure = lambda s, w, settings, n: self.measured(s, w, settings["g"], n)  # noqa: E731
        found = search(measure, lengths, W, {"g": GUIDANCE}, budget)
        return found.images, self.true(found.best.snapshot, found.best.w, found.best.settings["g"]) - self.floor


def _wall(start: float | None, d: float) -> float:
    return 0.0 if start is None else 0.5 * max(0.0, d - start) ** 3


def _counting(measure):
    asked = []
    return asked, lambda *setting: asked.append(setting) or measure(*setting)


def table(title: str, make, kinds, seeds, *, beside=(), budget: Budget | None = None) -> dict[str, dict[str, float]]:
    """Print one row a kind, and their sum; `beside` are kinds that the sum leaves out."""
    print(f"\n{title}")
    head = ("surfaces", "grid images", "median", "95 %", "<= 0.02", "our images", "median", "95 %", "<= 0.02", "images")
    print("{:>10} | {:>12} {:>7} {:>6} {:>8} | {:>12} {:>7} {:>6} {:>8} | {:>7}".format(*head))
    rows = {kind: np.array([(*s.official(), *s.ours(budget)) for s in (make(kind, seed) for seed in seeds)])
            for kind in (*kinds, *beside)}  # fmt: skip
    rows = {kind: rows[kind] for kind in kinds} | {"all": np.concatenate([rows[kind] for kind in kinds])} | rows
    out = {}
    for kind, values in rows.items():
        grid_images, grid_regret, images, regret = values.T
        out[kind] = {
            "images": images.mean() / grid_images.mean(),
            "good": float(np.mean(regret <= GOOD)),
            "grid_good": float(np.mean(grid_regret <= GOOD)),
        }
        grid_side = f"{grid_images.mean():12.0f} {_regrets(grid_regret)}"
        our_side = f"{images.mean():12.0f} {_regrets(regret)}"
        print(f"{kind:>10} | {grid_side} | {our_side} | {out[kind]['images']:7.1%}")
    return out


def _regrets(regret: np.ndarray) -> str:
    return f"{np.median(regret):7.4f} {np.quantile(regret, 0.95):6.3f} {np.mean(regret <= GOOD):8.1%}"


def simulated(seeds) -> dict[str, dict]:
    """Part (i): the search against the official grids on simulated surfaces."""
    fewer = Budget(ranking_images=2_500)
    return {
        "guidance": table("w and guidance", Valley, KINDS, seeds, beside=("turned",)),
        "fewer": table("w and guidance, 2,500 images while ranking", Valley, KINDS, seeds, budget=fewer),
        "one_axis": table("w alone", Curve, ONE_AXIS_KINDS, seeds),
        "two settings": table("w, guidance and another setting", Sheet, KINDS, seeds, beside=("turned",)),
        "three settings": table("w, guidance and two others", WiderSheet, KINDS, seeds, beside=("turned",)),
        "snapshots": table("four snapshots", Snapshots, KINDS, seeds),
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--seeds", default="200-249", show_default=True, callback=parse_seed_list,
              help="Of the surfaces, the same for every kind.")  # fmt: skip
@click.option("--digits", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Also part (ii), with real sampling, which is kept there; about ten minutes.")  # fmt: skip
def main(seeds: list[int], digits: Path | None) -> None:
    simulated(seeds)
    if digits:
        from search_digits import sampled  # loads PyTorch and scikit-learn

        sampled(digits, [0])


if __name__ == "__main__":
    main()
