"""The whole quickstart: all seeds, then the table, the pictures, `results.json` and the verdict."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from neon_edm.quickstart import pictures, report
from neon_edm.quickstart.one_seed import find_result
from neon_edm.quickstart.parallel import run_seeds, seed_folder
from neon_edm.quickstart.settings import DEFAULT, FAST, Quickstart, base_training
from neon_files.errors import UserError
from neon_run.cli import check_writable, write_result

FLOAT_TOLERANCE = 1e-5  # of w = -1 against theta_syn, absolute; the weights are of order 0.1 to 3


def quickstart_run(
    *, fast: bool, seeds: Sequence[int], out_dir: Path, num_workers: int, base_steps: int | None = None
) -> int:
    """Exit status: 0, or 1 where the results are not as expected. Raises UserError."""
    quickstart = FAST if fast else DEFAULT
    if base_steps is not None:
        quickstart = dataclasses.replace(quickstart, base=base_training(base_steps), judged=False)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError("--seeds: give at least one seed, and each once, as in 0-2")
    check_writable(out_dir, "--out")
    pictures.check_available()
    began = time.monotonic()
    print(f"Neon on {len(seeds)} x {quickstart.name}: real 8 x 8 digits, results in {out_dir}", flush=True)
    found = {seed: find_result(quickstart, seed, seed_folder(out_dir, seed)) for seed in seeds}
    records = {seed: record for seed, record in found.items() if record is not None}
    missing = [seed for seed in seeds if seed not in records]
    if len(missing) < len(seeds):
        finished = ", ".join(str(seed) for seed in seeds if seed not in missing)
        print(f"already finished: seed {finished} (remove {out_dir} to begin anew)", flush=True)
    if missing:
        records |= run_seeds(quickstart, missing, out_dir, num_workers)
    results = [records[seed] for seed in seeds]
    draw(results, out_dir)
    problems = broken(results) + (report.failures if quickstart.judged else report.wrong_directions)(results)
    seconds = round(time.monotonic() - began, 1)
    print(f"\n{report.table(results)}\n\n{report.explanation(results)}\n")
    if fast:
        print(
            "This was the fast form: it shows that everything runs and goes the right way; its distances are rough.\n"
        )
    for problem in problems:
        print(f"NOT AS EXPECTED: {problem}")
    print(f"pictures: {out_dir / 'quickstart.png'} and {out_dir / 'quickstart_curve.png'}; {seconds:.0f} s")
    print(f"report of every seed: {seed_folder(out_dir, results[0]['seed']) / 'report.html'} and the like")
    record = {"results": results, "problems": problems, "seconds": seconds, **conditions(quickstart, num_workers)}
    write_result(record, report.summary(results), out_dir / "results.json")
    return 1 if problems else 0


def broken(results: Sequence[dict]) -> list[str]:
    """Problems that no run may have: w = -1 is not theta_syn, or theta_syn is theta_base."""
    problems = []
    for result in results:
        name, error = f"seed {result['seed']}", result["minus_one_error"]
        if not error <= FLOAT_TOLERANCE:
            problems.append(f"{name}: w = -1 differs from the self-trained weights by {error:g}")
        if not result["step_length"] > 0:
            problems.append(f"{name}: the fine-tune changed nothing")
    return problems


def draw(results: Sequence[dict], out_dir: Path) -> None:
    """Both pictures, the grid from the first seed."""
    pictures.draw_curve(results, out_dir / "quickstart_curve.png")
    first = results[0]
    samples = pictures.read_samples(seed_folder(out_dir, first["seed"]) / "samples", first["seed"])
    pictures.draw_grid(samples, first, out_dir / "quickstart.png")


def conditions(quickstart: Quickstart, num_workers: int) -> dict:
    """Settings and versions, for the record."""
    return {
        "settings": dataclasses.asdict(quickstart),
        "workers": num_workers,
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": version("scikit-learn"),
        },
    }
