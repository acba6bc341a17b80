#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, in one process per GPU.

    torchrun --standalone --nproc_per_node=8 imm/sweep.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --snapshots training-runs/imm256/ns30k --num_steps 8 --out_dir sweeps/imm256

Networks are loaded once and moved in place; all points share their seeds. Finished points are kept: repeat the command
to go on. The best point is evaluated again on --final_images and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm, neon_core: run without installing

import click

from neon_core.distributed import file_hash, session
from neon_core.precision import float32_precision
from neon_files.checkpoint import find_file
from neon_files.errors import UserError
from neon_imm import options as o
from neon_imm.evaluate import load_backbone, result_line
from neon_imm.recipes import cfg_grid, w_grid
from neon_metrics.evaluate import Evaluator
from neon_run.cli import batch_option, check_writable, json_option, metric_options, parse_numbers, run, write_result
from neon_run.search.sweep import Sweep, early_stopped_grid, find_checkpoints


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--network", "--model_ckpt", "network", type=o.FILE, help="theta_base.  [default: the preset's]")
@click.option("--snapshots", type=o.FOLDER, help="The fine-tune's folder: every snapshot in it.")
@click.option("--synthetic", "--aux_resume", "aux", type=o.FILE, multiple=True, help="Or fine-tuned files one by one.")
@click.option("--w", "ws", callback=parse_numbers, help="Merge weights.  [default: the official grid]")
@click.option("--cfgs", callback=parse_numbers, help="Guidance scales.  [default: the official grid]")
@click.option("--tolerance", type=click.FloatRange(0), default=0.03, show_default=True,
              help="Go no further once FID is worse than the best by more than that.")  # fmt: skip
@click.option("--num_images", "--N", "num_images", type=click.IntRange(2), default=10_000, show_default=True,
              help="Per point of the search.")  # fmt: skip
@click.option("--final_images", type=click.IntRange(0), default=50_000, show_default=True,
              help="At the best point, with fresh seeds; 0: none.")  # fmt: skip
@batch_option
@o.sampling_options
@metric_options("fid", "")
@click.option("--out_dir", "--outdir", "out_dir", required=True, type=o.FOLDER, help="Where results are kept.")
@o.model_options
@json_option
def main(
    preset, network, snapshots, aux, ws, cfgs, tolerance, num_images, final_images, batch_size, reference, metrics,
    real_images, detector, out_dir, vae, compiled, device, json_path, **flags,
) -> None:  # fmt: skip
    """Search over snapshots, w and guidance."""
    recipe = o.row(preset)
    settings = {"label_rule": "balanced", **o.sampling_settings(preset, recipe.evaluate, flags)}
    with session(device) as where, float32_precision(allow_tf32=True):
        base = find_file(network or recipe.base)
        if not snapshots and not aux:
            raise UserError("--snapshots is missing; name the folder of a fine-tune, or checkpoints as --synthetic")
        found = find_checkpoints(snapshots) if snapshots else {path.stem: path for path in map(find_file, aux)}
        check_writable(out_dir, "--out_dir")
        evaluator = Evaluator(
            reference or recipe.fid_stats, device=where, metrics=metrics, detector=detector, real_images=real_images
        )
        backbone = load_backbone(base, recipe, where, vae, compiled)
        backbone.check_settings(**settings)
        identity = {"base_sha256": file_hash(base), "codec": backbone.prepared_key}
        grid = Sweep(backbone, evaluator, found, out_dir, settings=settings, batch_size=batch_size, identity=identity)
        steps, guided = settings.get("num_steps"), settings.get("cfg") is not None

        def measure(snapshot: str, w: float, cfg: float | None) -> float:
            return grid.measure(snapshot, w, range(num_images), cfg=cfg)["fid"]

        cfgs = cfgs or (cfg_grid(steps) if guided else [None])
        snapshot, w, cfg = early_stopped_grid(found, ws or w_grid(steps), cfgs, measure, tolerance)
        fresh = range(num_images, num_images + final_images)
        best = grid.measure(snapshot, w, fresh or range(num_images), cfg=cfg)
        best |= {"checkpoint": str(grid.write(base, snapshot, w))}
        write_result({"best": best, "points": grid.points()}, "best: " + result_line(best), json_path)


if __name__ == "__main__":
    run(main)
