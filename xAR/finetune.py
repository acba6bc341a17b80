#!/usr/bin/env python3
"""Fine-tune the base briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 xAR/finetune.py --model xar_large --data syn/xarl --outdir runs/xarl

Settings left out are the paper's for the row. The autoencoder sees every image once; its moments are kept beside the
set. A killed run is continued by the same command, on any number of processes that divides the work.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.parallel import MODES
from neon_core.precision import float32_precision
from neon_run.cli import check_writable, device_option, json_option, run, seed_option, write_result
from neon_xar import options as o
from neon_xar.backbone import PRECISIONS
from neon_xar.recipes import RECIPES
from neon_xar.training import fine_tune, with_settings

POSITIVE = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(1)


@click.command(**o.SETTINGS)
@o.model_option(default="xar_base", show_default=True)
@click.option("--model_ckpt", "--resume", "base", type=o.FILE, help="theta_base.  [default: the recipe's]")
@o.vae_option()
@click.option("--data", "--data_path", "data", required=True, metavar="PATH", help="The synthetic set: folder or .zip.")
@click.option("--outdir", "--output_dir", "out_dir", type=o.FOLDER, required=True, help="Folder of the run.")
@click.option("--images", type=COUNT, help="Length, in images seen.  [default here and below: the recipe's]")
@click.option("--batch_size", type=COUNT, help="Images per step, over all processes.")
@click.option("--micro_batch_size", type=COUNT, help="Images per forward pass.")
@click.option("--lr", type=POSITIVE, help="Learning rate at the end of the ramp.")
@click.option("--ramp_images", type=COUNT, help="Length of the linear ramp from 0, in images seen.")
@click.option("--ema_decay", "--ema_rate", "ema_decay", type=click.FloatRange(0, 1), help="Weight average, per step.")
@click.option("--weight_decay", type=click.FloatRange(0), help="Of matrices and embeddings.")
@click.option("--clip_norm", "--grad_clip", "clip_norm", type=POSITIVE, help="Limit of the gradient's norm.")
@click.option("--snapshot_images", "--save_img_interval", "snapshot_images", type=COUNT, help="Between snapshots.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Of the forward passes.")
@click.option("--flip/--no_flip", default=True, show_default=True, help="Every image mirrored half of the time.")
@click.option("--cached_path", "cache_dir", type=o.FOLDER, help="Of the moments.  [default: <data>.prepared]")
@click.option("--parallel", "mode", type=click.Choice(MODES), default="ddp", show_default=True, help="fsdp: sharded.")
@click.option("--activation_checkpointing", is_flag=True, help="Less memory, about a third slower.")
@seed_option
@o.tf32_option
@device_option
@json_option
def main(
    model, base, vae_path, data, out_dir, flip, cache_dir, mode, activation_checkpointing, seed, tf32, device,
    json_path, **given,
) -> None:  # fmt: skip
    """Train theta_syn."""
    recipe = with_settings(RECIPES[model], **given)
    check_writable(out_dir, "--outdir")
    with session(device) as where, float32_precision(tf32):
        how = {"mode": mode, "activation_checkpointing": activation_checkpointing, "cache_dir": cache_dir}
        what = {"model": model, "flip": flip, "seed": seed}
        snapshots = fine_tune(base or recipe.base, vae_path, data, recipe, out_dir, device=where, **what, **how)
        last = max(snapshots)
        line = f"{len(snapshots)} snapshots | {out_dir} | {last} images | last={snapshots[last].name}"
        write_result({"snapshots": {n: str(path) for n, path in snapshots.items()}}, line, json_path)


if __name__ == "__main__":
    run(main)
