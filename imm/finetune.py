#!/usr/bin/env python3
"""Fine-tune the base IMM briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 imm/finetune.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --data datasets/imm256/ns30k --outdir training-runs/imm256/ns30k

--data holds images, whose moments are then made once and kept beside them, or is the zip of moments of imm/encode.py.
A killed run is continued by the same command, on any number of processes that divides the work. Then: imm/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.parallel import MODES
from neon_core.precision import float32_precision
from neon_core.selftrain import OPTIMIZERS, PRECISIONS
from neon_files.checkpoint import find_file
from neon_imm import options as o
from neon_imm.training import fine_tune, with_settings
from neon_run.cli import check_writable, json_option, run, seed_option, write_result


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--network", "--model_ckpt", "network", type=o.FILE, help="theta_base.  [default: the preset's]")
@click.option("--data", required=True, type=o.FILE, help="The synthetic set, folder or .zip.")
@click.option("--outdir", "--out_dir", "outdir", required=True, type=o.FOLDER, help="Folder of the run.")
@click.option("--images", type=o.COUNT, help="Length.  [default here and below: the preset's]")
@click.option("--batch_size", type=o.COUNT, help="Images per step, over all processes.")
@click.option("--micro_batch_size", type=o.COUNT, help="Images per forward pass; changes the random numbers.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)))
@click.option("--ema_decay", type=click.FloatRange(0, 1), help="Of the averaged weights, per step; 0: no averaging.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Of the student; the teacher runs in fp32.")
@click.option("--snapshot_images", type=o.COUNT, help="Between two snapshots.")
@click.option("--k", type=click.FloatRange(0), help="Of the loss: r lies 2^-k of the noise range below t.")
@click.option("--matrix_size", type=click.IntRange(2), help="Of the loss: samples that share their times.")
@click.option("--xflip", is_flag=True, help="Also train on the mirror images.")
@click.option("--max_size", type=o.COUNT, help="Train on so many random items only.")
@click.option("--parallel", type=click.Choice(MODES), default="ddp", show_default=True, help="Replicate or shard.")
@click.option("--activation_checkpointing", is_flag=True, help="Less memory, a third more time.")
@seed_option
@o.model_options
@json_option
def main(
    preset, network, data, outdir, k, matrix_size, xflip, max_size, parallel, activation_checkpointing, seed, vae,
    compiled, device, json_path, **given,
) -> None:  # fmt: skip
    """Train theta_syn with the moment matching loss."""
    recipe = with_settings(o.row(preset), **given)
    with session(device) as where, float32_precision(allow_tf32=False):  # as officially
        base = find_file(network or recipe.base)
        check_writable(outdir, "--outdir")
        how = {"mode": parallel, "activation_checkpointing": activation_checkpointing, "vae": vae, "compiled": compiled}
        what = {"loss": {"k": k, "matrix_size": matrix_size}, "xflip": xflip, "max_size": max_size, "seed": seed}
        snapshots = fine_tune(base, data, recipe, outdir, device=where, **what, **how)
        line = f"{outdir} | snapshots={len(snapshots)} | images={max(snapshots)} | {snapshots[max(snapshots)].name}"
        write_result({"snapshots": {n: str(path) for n, path in snapshots.items()}}, line, json_path)


if __name__ == "__main__":
    run(main)
