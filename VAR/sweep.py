#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, in one process per GPU.

    torchrun --standalone --nproc_per_node=8 VAR/sweep.py --preset imagenet_256 \
        --snapshots training-runs/var256/ns750k --w 0.4,0.8,1.0,1.2 --cfg 2.4,2.6,2.8,3.0 --out_dir sweeps/var256

Networks are loaded once and moved in place; all points share their seeds. Finished points are kept: repeat the command
to go on. The best point is evaluated again on --final_images and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var, neon_core: run without installing

import click

from neon_core.distributed import file_hash, session
from neon_core.precision import float32_precision
from neon_files.checkpoint import find_file
from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_run.cli import (
    check_writable,
    device_option,
    json_option,
    metric_options,
    parse_numbers,
    run,
    write_result,
)
from neon_run.search.sweep import Sweep, early_stopped_grid, find_checkpoints
from neon_var import options as o
from neon_var.backbone import VARBackbone
from neon_var.evaluate import result_line
from neon_var.recipes import RECIPES


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--base", "--var_ckpt", "base", type=o.FILE, help="theta_base.  [default: the preset's]")
@o.model_options
@click.option("--snapshots", type=o.FOLDER, help="The fine-tune's folder: every snapshot in it.")
@click.option("--var_aux", "aux", type=o.FILE, multiple=True, help="Or fine-tuned checkpoints one by one.")
@click.option("--w", default="0.4,0.8,1.0,1.2", show_default=True, callback=parse_numbers, help="Merge weights.")
@click.option("--cfg", callback=parse_numbers, help="Guidance values.  [default: the preset's one]")
@click.option("--tolerance", type=click.FloatRange(0), default=0.03, show_default=True,
              help="Go no further once FID is worse than the best by more than that.")  # fmt: skip
@o.sampler_options
@click.option("--num_images", "--N", "num_images", type=click.IntRange(2), default=10_000, show_default=True,
              help="Per point of the search.")  # fmt: skip
@click.option("--final_images", type=click.IntRange(0), default=50_000, show_default=True,
              help="At the best point, with fresh seeds; 0: none.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds are seed, seed+1, ...")
@o.batch_option
@metric_options("fid,is", "")
@click.option("--out_dir", "--outdir", "out_dir", required=True, type=o.FOLDER, help="Where results are kept.")
@device_option
@json_option
def main(
    preset, base, vae_ckpt, model_depth, compiled, snapshots, aux, w, cfg, tolerance, num_images, final_images, seed,
    batch_size, reference, metrics, real_images, detector, out_dir, device, json_path, **flags,
) -> None:  # fmt: skip
    """Search over snapshots, w and guidance."""
    recipe = RECIPES[preset]
    settings = o.sampler_settings(flags, dict(recipe.evaluate))
    batch_size = batch_size or o.BATCH_SIZE[preset]
    with session(device) as where, float32_precision(allow_tf32=True):
        base, vae = o.check_files(base or recipe.base, vae_ckpt, "--base")
        if not snapshots and not aux:
            raise UserError("--snapshots is missing; name the folder of a fine-tune, or checkpoints as --var_aux")
        found = find_checkpoints(snapshots) if snapshots else {path.stem: path for path in map(find_file, aux)}
        check_writable(out_dir, "--out_dir")
        evaluator = Evaluator(
            reference or recipe.fid_stats, device=where, metrics=metrics, detector=detector, real_images=real_images
        )
        backbone = VARBackbone.load(base, recipe, where, vae_ckpt=vae, model_depth=model_depth, compiled=compiled)
        backbone.check_settings(**settings)
        identity = {"base_sha256": file_hash(base), "vae_sha256": file_hash(vae)}
        grid = Sweep(backbone, evaluator, found, out_dir, settings=settings, batch_size=batch_size, identity=identity)
        seeds = range(seed, seed + num_images)

        def measure(snapshot: str, w: float, cfg: float) -> float:
            return grid.measure(snapshot, w, seeds, cfg=cfg)["fid"]

        snapshot, best_w, best_cfg = early_stopped_grid(found, w, cfg or [recipe.evaluate["cfg"]], measure, tolerance)
        fresh = range(seed + num_images, seed + num_images + final_images)
        best = grid.measure(snapshot, best_w, fresh if final_images else seeds, cfg=best_cfg)
        merged = grid.write(base, snapshot, best_w)
        best |= {"checkpoint": str(merged), "depth": backbone.net.depth}
        write_result({"best": best, "points": grid.points()}, "best: " + result_line(best), json_path)


if __name__ == "__main__":
    run(main)
