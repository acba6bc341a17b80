"""The command of edm/quickstart.py."""

from __future__ import annotations

from pathlib import Path

import click

from neon_core.distributed import cores
from neon_core.seeds import parse_seeds
from neon_run.cli import run
from neon_run.start import imported


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--fast", is_flag=True, help="Small and short, one seed: shows that everything runs and goes the right way."
)
@click.option("--seeds", help="Runs, each with its own split, weights and noise.  [default: 0-2; with --fast: 0]")
@click.option(
    "--out",
    "--outdir",
    "out_dir",
    type=click.Path(path_type=Path),
    help="Folder of the results.  [default: runs/quickstart; with --fast: runs/quickstart-fast]",
)
@click.option("--base_steps", type=click.IntRange(100), help="Train theta_base for longer or shorter; not judged then.")
@click.option("--workers", type=click.IntRange(1), help="Seeds at a time, one core each.  [default: as many as cores]")
def quickstart(fast: bool, seeds: str | None, out_dir: Path | None, base_steps: int | None, workers: int | None) -> int:
    """Train a small generator on real handwritten digits, let it train on its own samples, and merge with Neon."""
    run_seeds = parse_seeds(seeds or ("0" if fast else "0-2"))
    whole = imported("neon_edm.quickstart.main")  # loads scikit-learn: not before the flags are known to be good
    return whole.quickstart_run(
        fast=fast,
        base_steps=base_steps,
        seeds=run_seeds,
        out_dir=out_dir or Path("runs/quickstart-fast" if fast else "runs/quickstart"),
        num_workers=workers or cores(),
    )


def main() -> None:
    """The command on this process's arguments."""
    run(quickstart)
