#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, weights moved in place.

    torchrun --standalone --nproc_per_node=8 xAR/sweep.py --model xar_large --snapshots runs/xarl --out_dir sweeps/xarl

Grids and early stop left out are the official ones of the row. All points share their seeds; finished points are kept,
so that the same command goes on after a kill. The best one is written as <out_dir>/neon.safetensors and, with --final,
evaluated with 50,000 other seeds.
"""

import math
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_files.checkpoint import find_file
from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_run.cli import batch_option, check_writable, device_option, json_option, parse_numbers, run, write_result
from neon_run.search.sweep import find_checkpoints
from neon_xar import options as o
from neon_xar.backbone import XARBackbone
from neon_xar.evaluate import result_line, sweep
from neon_xar.recipes import RECIPES, SEARCHES


@click.command(**o.SETTINGS)
@o.model_option(default="xar_base", show_default=True)
@click.option("--model_ckpt", "--base", "base", type=o.FILE, help="theta_base.  [default: the recipe's]")
@click.option("--model_ckpt_aux", "aux", type=o.FILE, multiple=True, help="theta_syn, one or several files.")
@click.option("--snapshots", type=o.FOLDER, help="Or the folder of a fine-tune: all its snapshots.")
@o.vae_option()
@click.option("--w", callback=parse_numbers, help="Merge weights.  [default: the official grid of the row]")
@click.option("--cfgs", callback=parse_numbers, help="Guidance scales.  [default: the official grid of the row]")
@click.option("--tolerance", type=float, help="Early stop; inf for the whole grid.  [default: the official one]")
@click.option("--refine/--no_refine", default=True, show_default=True, help="Also the best point's neighbours at 0.1.")
@click.option("--final", is_flag=True, help="Evaluate the best point on --final_images other seeds.")
@click.option("--final_images", type=click.IntRange(2), default=50_000, show_default=True)
@o.seeds_options(10_000, default_seed=2)
@batch_option
@o.sampler_options
@o.metric_options
@click.option("--out_dir", "--out_dir_fid", "out_dir", type=o.FOLDER, required=True, help="Where results are kept.")
@o.compile_option
@o.tf32_option
@device_option
@json_option
def main(
    model, base, aux, snapshots, vae_path, w, cfgs, tolerance, refine, final, final_images, num_images, seed, seeds,
    batch_size, reference, no_isc, metrics, real_images, detector, out_dir, compiled, tf32, device, json_path, **flags,
) -> None:  # fmt: skip
    """Search over snapshots, w and guidance."""
    recipe, official = RECIPES[model], SEARCHES[model]
    one_cfg = flags["cfg"]
    settings = o.sampler_settings(flags, recipe.evaluate)
    tolerance = official.tolerance if tolerance is None else tolerance
    if math.isnan(tolerance) or tolerance < 0:
        raise UserError(f"--tolerance {tolerance}: a rise of FID is wanted, 0 or more")
    if not snapshots and not aux:
        raise UserError("--snapshots is missing: the folder of a fine-tune (or --model_ckpt_aux, its files)")
    check_writable(out_dir, "--out_dir")
    with session(device) as where, float32_precision(tf32):
        found = {path.stem: find_file(path) for path in aux} if aux else find_checkpoints(snapshots)
        metrics = tuple(dict.fromkeys(("fid", *(name for name in metrics if not (no_isc and name == "is")))))
        evaluator = Evaluator(
            reference or recipe.fid_stats, device=where, metrics=metrics, detector=detector, real_images=real_images
        )
        base = XARBackbone.find("--model_ckpt", base or recipe.base, model)
        backbone = XARBackbone.load(base, recipe, where, vae_path=vae_path, model=model, compiled=compiled)
        result = sweep(
            backbone,
            evaluator,
            base,
            found,
            out_dir,
            ws=w or official.ws,
            cfgs=cfgs or ((one_cfg,) if one_cfg is not None else official.cfgs),
            seeds=o.chosen_seeds(num_images, seed, seeds),
            final_seeds=o.chosen_seeds(final_images, 1, None) if final else None,
            tolerance=tolerance,
            refine=refine,
            settings=settings,
            batch_size=batch_size,
        )
        write_result(result, "best: " + result_line(result["best"]), json_path)


if __name__ == "__main__":
    run(main)
