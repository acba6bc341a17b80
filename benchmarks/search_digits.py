#!/usr/bin/env python3
"""The search against the official early-stopped grid with real sampling: the quickstart's model, w alone and together
with guidance.

    python benchmarks/search_digits.py --out runs/search_digits            about ten minutes a seed on one core

Three procedures choose (snapshot, w, guidance) by the distance to training digits, on the same seeds: ours, which is
the search stage of `neon reproduce`; the official one, ascending values that stop early where the distance rises by
0.03; and a fine grid without early stops, of which every setting is measured with a quarter of the images and the best
twenty with all. What they chose is then measured on images that none of them has seen, in eight blocks of equal seeds,
so that differences are paired. Image counts are 0.4 of a published row's, since 32 features need fewer than 2048.
"""

import dataclasses
import sys
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1,)] + [
    str(Path(__file__).resolve().parents[1] / "edm")
]

import click
import numpy as np
import torch

from neon_core.seeds import parse_seeds
from neon_edm.quickstart.prepare import CPU
from neon_edm.quickstart.settings import DEFAULT, GUIDED, Quickstart
from neon_files.atomic import write_json
from neon_run.cli import run as run_command
from neon_run.flags import parse_seed_list
from neon_run.reproduce.measure import images_of
from neon_run.reproduce.reproduction import Reproduction
from neon_run.search.quick import Budget, Settings
from neon_run.search.sweep import BASE, early_stopped_grid

SCALE = 0.4
BLOCKS = 8
FINALISTS = 20
KINDS = {"w": DEFAULT, "w, guidance": GUIDED}


def compare(kind: str, quickstart: Quickstart, seed: int, out: Path) -> list[dict]:
    """One line per procedure: images, what it chose, and its distance on fresh images."""
    many, few = round(SCALE * Budget().deciding_images), round(SCALE * Budget().ranking_images)
    row = dataclasses.replace(quickstart, num_evaluate=many).row(seed)
    plan = dataclasses.replace(quickstart.plan(seed), ranking_images=few, controls=False, second_block=False)
    reproduction = Reproduction(row, out, plan, CPU)
    results = reproduction.run()
    sweep, seeds, best = reproduction.sweep, reproduction.seeds, results["best"]
    chosen = {"ours": ((best["snapshot"], best["w"], best["settings"]), results["search"]["images"])}

    points = []

    def measure(snapshot: str, w: float, settings: Settings, count: int = many) -> float:
        fid = sweep.grown(snapshot, w, seeds, count, **settings)["fid"]
        points.append({"snapshot": snapshot if w else BASE, "w": w, "settings": settings, "num_images": count})
        return fid

    grid, names = row.grid, list(sweep.snapshots)
    choice = early_stopped_grid(names, grid.ws, grid.settings, measure, grid.tolerance)
    chosen["official grid"] = (choice, images_of(points))
    points.clear()
    varied = [dict(zip(grid.settings, values, strict=True)) for values in product(*grid.settings.values())]
    places = [(s, w, settings) for s in names for w in grid.ws if w for settings in varied]
    places += [(BASE, 0.0, settings) for settings in varied if 0 in grid.ws]
    ranked = sorted(places, key=lambda setting: measure(*setting, many // 4))[:FINALISTS]
    chosen["fine grid"] = (min(ranked, key=lambda setting: measure(*setting)), images_of(points))

    chosen["(base)"] = ((BASE, 0.0, results["base_best"]["settings"]), 0)
    first = parse_seeds(row.evaluate_seeds)[-1] + 1
    blocks = [range(first + i * many, first + (i + 1) * many) for i in range(BLOCKS)]
    found = {}
    for name, ((snapshot, w, settings), _) in chosen.items():
        found[name] = np.array([sweep.grown(snapshot, w, block, many, **settings)["fid"] for block in blocks])
    lines = []
    for name, (setting, images) in chosen.items():
        apart = found[name] - found["fine grid"]
        line = {"searched": kind, "seed": seed, "procedure": name, "images": images}
        line |= {"snapshot": setting[0], "w": setting[1], "guidance": setting[2].get("guidance")}
        line |= {"distance": found[name].mean(), "above_fine": apart.mean()}
        lines.append(line | {"standard_error": apart.std(ddof=1) / BLOCKS**0.5})
    return lines


def sampled(out: Path, seeds: list[int]) -> list[dict]:
    """Part (ii): all comparisons, printed as a table; `out` keeps what was sampled, for a second call."""
    torch.set_num_threads(1)
    every = []
    for seed in seeds:
        for kind, quickstart in KINDS.items():
            lines = compare(kind, quickstart, seed, out / f"{quickstart.name}-{seed}")
            write_json(out / f"{quickstart.name}-{seed}.json", lines)
            every += lines
    print("\n{:<13}{:>4}  {:<14}{:>8}  {:>5} {:>8} {:>9}  {}".format(
        "searched", "seed", "procedure", "images", "w", "guidance", "distance", "above the fine grid's"))  # fmt: skip
    for line in every:
        guidance = "-" if line["guidance"] is None else f"{line['guidance']:.2f}"
        print(
            f"{line['searched']:<13}{line['seed']:>4}  {line['procedure']:<14}{line['images']:>8}  {line['w']:>5.2f} "
            f"{guidance:>8} {line['distance']:>9.3f}  {line['above_fine']:+.3f} +- {line['standard_error']:.3f}"
        )
    return every


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/search_digits"))
@click.option("--seeds", default="0", show_default=True, callback=parse_seed_list, help="Of the quickstart's runs.")
def main(out: Path, seeds: list[int]) -> None:
    """The search on the quickstart's model, against the official grid and a fine one."""
    sampled(out, seeds)


if __name__ == "__main__":
    run_command(main)
