#!/usr/bin/env python3
"""Fine-tune the base network briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    python edm/finetune.py --preset cifar10_cond --data datasets/cifar10/ns6k --outdir training-runs/cifar10/ns6k
    torchrun --standalone --nproc_per_node=8 edm/finetune.py --preset ffhq64 --data S --transfer base.pkl --outdir run

A killed run is continued by the same command, on any number of processes that divides the work. Then: edm/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_edm import official
from neon_edm import options as o
from neon_edm.recipes import RECIPES
from neon_edm.training import fine_tune
from neon_run.cli import device_option, json_option, run, seed_option, write_result

POSITIVE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(0, 1)


@click.command(**o.SETTINGS)
@click.option("--preset", type=click.Choice(list(RECIPES)), default="cifar10_cond", show_default=True, help="The row.")
@o.network_option("--transfer", required=False, help="Base network: path or URL.  [default: that of the preset]")
@click.option("--data", required=True, metavar="PATH", help="The synthetic set: folder or .zip with dataset.json.")
@click.option("--outdir", required=True, type=o.FOLDER, help="Folder of the run.")
@click.option("--duration", type=POSITIVE, help="Length, millions of images.  [default here and below: the preset's]")
@click.option("--batch", type=click.IntRange(1), help="Images per step, over all processes.")
@click.option("--micro_batch", "--batch-gpu", "micro_batch", type=click.IntRange(1), help="Images per forward pass.")
@click.option("--lr", type=POSITIVE, help="Learning rate that is reached after 10 million images.")
@click.option("--ema", type=POSITIVE, help="Half-life of the weight average, millions of images.")
@click.option("--dropout", type=SHARE, help="Dropout probability.")
@click.option("--augment", type=SHARE, help="Probability of each augmentation; 0: none.")
@click.option("--xflip", type=bool, default=False, show_default=True, help="Also every image mirrored.")
@click.option("--tick", type=click.IntRange(1), help="Length of a tick, thousands of images.")
@click.option("--snap", type=click.IntRange(1), help="Ticks between snapshots.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the forward passes.")
@seed_option
@o.network_flags
@o.tf32_option
@device_option
@json_option
def main(
    preset, network, data, outdir, duration, batch, micro_batch, lr, ema, dropout, augment, xflip, tick, snap,
    precision, seed, tf32, device, json_path, **claims,
) -> None:  # fmt: skip
    """Train theta_syn."""
    recipe = RECIPES[preset].with_settings(
        images=duration and official.duration_images(duration),
        batch_size=batch,
        micro_batch_size=micro_batch,
        lr=lr,
        ema_images=ema and official.kimg(ema),
        tick_images=tick and 1000 * tick,
        snapshot_ticks=snap,
        precision=precision,
        augment=augment,
        dropout=dropout,
    )
    with session(device) as where, float32_precision(tf32):
        snapshots = fine_tune(
            network or recipe.base, data, recipe, outdir, seed=seed, xflip=xflip, claims=claims, device=where
        )
        line = (
            f"{len(snapshots)} snapshots | {outdir} | {max(snapshots)} images | last={snapshots[max(snapshots)].name}"
        )
        write_result({"snapshots": {n: str(path) for n, path in snapshots.items()}}, line, json_path)


if __name__ == "__main__":
    run(main)
