#!/usr/bin/env python3
"""Find w: the FID of theta_base - w (theta_syn - theta_base) over the snapshots of a fine-tune and a list of w.

    python edm/sweep.py --preset cifar10_cond --snapshots training-runs/cifar10/ns6k --out_dir sweeps/cifar10
    torchrun --standalone --nproc_per_node=8 edm/sweep.py --base base.pkl --snapshots run --ref ref.npz --out_dir sweep

All points share their noise. Finished points are kept: repeat the command to go on. The best point is evaluated
again on --seeds and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

import click

from neon_core.distributed import file_hash, session
from neon_core.precision import float32_precision
from neon_core.seeds import parse_seeds
from neon_edm import options as o
from neon_edm.backbone import EDMBackbone
from neon_edm.recipes import RECIPES, w_grid
from neon_edm.report import result_line
from neon_files.downloads import fetch
from neon_metrics.evaluate import Evaluator
from neon_run import cli
from neon_run.search.sweep import BASE, Sweep, early_stopped_grid, find_checkpoints


@click.command(**o.SETTINGS)
@o.preset_option
@o.network_option("--base", "--network_pkl_base", required=False, help="theta_base.  [default: that of the preset]")
@click.option("--snapshots", "--network_pkl_aux_dir", "snapshots", required=True, type=o.FOLDER, help="The fine-tune.")
@click.option("--w", "--differential_weights", "ws", callback=cli.parse_numbers,
              help="Merge weights to try.  [default: 0 to 2 in steps of 0.25, for ffhq64 to 3]")  # fmt: skip
@click.option("--min_training_step", default=51, show_default=True, help="Earliest snapshot, kimg.")
@click.option("--max_training_step", default=10000, show_default=True, help="Latest snapshot, kimg.")
@click.option("--tolerance", default=0.03, show_default=True, help="Leave a snapshot once FID rises by more.")
@o.seeds_option("0-9999", "Of the search.", "--seeds_test", "seeds_test")
@o.seeds_option(None, "Of the best point.  [default: those of the preset, else 50000-99999]")
@click.option("--final/--no_final", default=True, show_default=True, help="Evaluate the best point on --seeds.")
@cli.batch_option
@o.sampler_options
@cli.metric_options("fid", "")
@click.option("--out_dir", "--outdir", "out_dir", required=True, type=o.FOLDER, help="Where results are kept.")
@o.tf32_option
@cli.device_option
@cli.json_option
def main(
    preset, network, snapshots, ws, min_training_step, max_training_step, tolerance, seeds_test, seeds, final,
    batch_size, reference, metrics, real_images, detector, out_dir, tf32, device, json_path, **flags,
) -> None:  # fmt: skip
    """Search over snapshots and w."""
    recipe = RECIPES.get(preset)
    settings = o.sampler_settings(flags, recipe and recipe.evaluate)
    reference = o.preset_or(reference, recipe, "fid_stats", "--ref")
    network = o.preset_or(network, recipe, "base", "--base")
    with session(device) as where, float32_precision(tf32):
        found = find_checkpoints(snapshots, 1000 * min_training_step, 1000 * max_training_step)
        metrics = tuple(dict.fromkeys(("fid", *metrics)))
        evaluator = Evaluator(reference, device=where, metrics=metrics, detector=detector, real_images=real_images)
        base = fetch(network)
        backbone = EDMBackbone.load(base, None, where)
        cli.check_writable(out_dir, "--out_dir")
        identity = {"base_sha256": file_hash(base), "tf32": tf32}
        grid = Sweep(backbone, evaluator, found, out_dir, settings=settings, batch_size=batch_size, identity=identity)
        measure = lambda snapshot, w, _: grid.measure(snapshot, w, seeds_test)["fid"]  # noqa: E731
        snapshot, w, _ = early_stopped_grid(found, ws or w_grid(preset), [None], measure, tolerance)
        fresh = seeds or parse_seeds(recipe.evaluate_seeds if recipe else "50000-99999")
        best = grid.measure(snapshot, w, fresh if final else seeds_test)
        if best["snapshot"] != BASE:
            best |= {"checkpoint": str(grid.write(base, snapshot, w))}
        line = f"best: {best['snapshot']} | w={w:g} | {result_line(best, backbone.num_classes)}"
        cli.write_result({"best": best, "points": grid.points()}, line, json_path)


if __name__ == "__main__":
    cli.run(main)
