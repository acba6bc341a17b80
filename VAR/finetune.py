#!/usr/bin/env python3
"""Fine-tune the base VAR briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 VAR/finetune.py --preset imagenet_256 --data datasets/var256/ns750k \
        --outdir training-runs/var256/ns750k
    torchrun --standalone --nproc_per_node=8 VAR/finetune.py --preset imagenet_512 --data datasets/var512/ns90k \
        --outdir training-runs/var512/ns90k --parallel fsdp --activation_checkpointing --precision bf16

A killed run is continued by the same command, on any number of processes that divides the work. Then: VAR/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.parallel import MODES
from neon_core.precision import float32_precision
from neon_run.cli import check_writable, device_option, json_option, run, seed_option, write_result
from neon_var import options as o
from neon_var.recipes import RECIPES
from neon_var.training import fine_tune, with_settings

COUNT = click.IntRange(1)


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--var_ckpt", "--resume", "var_ckpt", type=o.FILE, help="Base checkpoint.  [default: the preset's]")
@click.option("--vae_ckpt", type=o.FILE, help="The VQVAE.  [default: checkpoints/vae_ch160v4096z32.pth]")
@click.option("--model_depth", "--depth", "model_depth", type=COUNT, help="Blocks.  [default: 16 at 256, 36 at 512]")
@click.option("--data", "--data_path", "data", required=True, metavar="PATH", help="The synthetic set, folder or .zip.")
@click.option("--outdir", required=True, type=o.FOLDER, help="Folder of the run.")
@click.option(
    "--images", "--total_images", "images", type=COUNT, help="Length.  [default here and below: the preset's]"
)
@click.option("--batch_size", "--bs", "batch_size", type=COUNT, help="Images per step, over all processes.")
@click.option(
    "--micro_batch_size", type=COUNT, help="Images per forward pass; changes the random numbers, ranks do not."
)
@click.option("--lr", "--target_lr", "lr", type=click.FloatRange(0, min_open=True), help="Where the climb ends.")
@click.option("--ramp_images", type=COUNT, help="Length of the climb from 0 to --lr.")
@click.option("--snapshot_images", "--save_interval", "snapshot_images", type=COUNT, help="Between two snapshots.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the forward passes.")
@click.option(
    "--token_crops",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Fixed crops per image, whose tokens are kept on disk; 0: a new random crop at every visit, as officially.",
)
@click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Replicate or shard.")
@click.option("--activation_checkpointing", is_flag=True, help="Less memory, a third more time.")
@seed_option
@device_option
@json_option
def main(
    preset, var_ckpt, vae_ckpt, model_depth, data, outdir, token_crops, parallel, activation_checkpointing, seed,
    device, json_path, **given,
) -> None:  # fmt: skip
    """Train theta_syn."""
    recipe = with_settings(RECIPES[preset], **given)
    with session(device) as where, float32_precision(allow_tf32=True):
        base, vae = o.check_files(var_ckpt or recipe.base, vae_ckpt)
        check_writable(outdir, "--outdir")
        how = {"mode": parallel, "activation_checkpointing": activation_checkpointing, "token_crops": token_crops}
        snapshots = fine_tune(base, vae, data, recipe, outdir, seed=seed, device=where, model_depth=model_depth, **how)
        line = (
            f"{len(snapshots)} snapshots | {outdir} | {max(snapshots)} images | last={snapshots[max(snapshots)].name}"
        )
        write_result({"snapshots": {n: str(path) for n, path in snapshots.items()}}, line, json_path)


if __name__ == "__main__":
    run(main)
