#!/usr/bin/env python3
"""Find w: the FID of theta_base - w (theta_syn - theta_base) over the snapshots of a fine-tune and a list of w.

    python edm/sweep.py --preset cifar10_cond --snapshots training-runs/cifar10/ns6k --out_dir sweeps/cifar10
    torchrun --standalone --nproc_per_node=8 edm/sweep.py --base base.pkl --snapshots run --ref ref.npz --out_dir sweep

Networks are loaded once and moved in place; all points share their noise. Finished points are kept: repeat the command
to go on. The best point is evaluated again on --seeds and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

import click

from neon_core.cli import check_writable, device_option, json_option, run, write_result
from neon_core.distributed import session
from neon_core.metrics.detector import float32_precision
from neon_core.seeds import parse_seeds
from neon_edm.options import (
    SETTINGS,
    batch_option,
    metric_options,
    network_option,
    preset_option,
    require,
    sampler_options,
    sampler_settings,
    seeds_option,
    tf32_option,
    weights_option,
)
from neon_edm.recipes import RECIPES
from neon_edm.search import sweep

KIMG = click.IntRange(0)


@click.command(**SETTINGS)
@preset_option
@network_option("--base", "--network_pkl_base", required=False, help="theta_base.  [default: that of the preset]")
@click.option(
    "--snapshots", "--network_pkl_aux_dir", "snapshots", required=True, metavar="DIR", help="The fine-tune's folder."
)
@weights_option
@click.option("--max_training_step", type=KIMG, default=10000, show_default=True, help="Latest snapshot, kimg.")
@click.option(
    "--min_training_step", type=KIMG, default=51, show_default=True, help="Earliest; the first tick is left out."
)
@click.option("--stop_rise", type=click.FloatRange(0), help="Leave a snapshot once FID rises by more from w to w.")
@seeds_option("0-9999", "Of the search.", "--seeds_test", "--seeds_search", "seeds_test")
@seeds_option(None, "Of the best point.  [default: those of the preset, else 50000-99999]")
@click.option("--final/--no_final", default=True, show_default=True, help="Evaluate the best point on --seeds.")
@metric_options
@batch_option()
@sampler_options
@click.option("--out_dir", "--outdir", "out_dir", required=True, type=click.Path(file_okay=False, path_type=Path))
@tf32_option
@device_option
@json_option
def main(preset, network, snapshots, reference, seeds, out_dir, tf32, device, json_path, **flags) -> None:
    """Search over snapshots and w."""
    recipe = RECIPES.get(preset)
    settings = sampler_settings(flags, recipe and recipe.evaluate)
    base = require(network or (recipe and recipe.base), "--base", preset)
    reference = require(reference or (recipe and recipe.fid_stats), "--ref", preset)
    seeds = seeds or parse_seeds(recipe.evaluate_seeds if recipe else "50000-99999")
    check_writable(out_dir, "--out_dir")
    with session(device) as where, float32_precision(tf32):
        result = sweep(base, snapshots, reference, out_dir, settings=settings, seeds=seeds, device=where, **flags)
        write_result(result, result["line"], json_path)


if __name__ == "__main__":
    run(main)
