#!/usr/bin/env python3
"""Draw the synthetic set S from the base VAR: PNG images with their labels.

    torchrun --standalone --nproc_per_node=8 VAR/generate.py --preset imagenet_256 --outdir datasets/var256/ns750k
    python VAR/generate.py --var_ckpt base.safetensors --vae_ckpt vae.safetensors --num_images 1000 --outdir S

A killed run is continued by the same command, on any number of processes. Every 1000 consecutive seeds hold every
class once.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var, neon_core: run without installing

import click

from neon_core.distributed import file_hash, session
from neon_core.precision import float32_precision
from neon_core.synthetic import generate_set, origin
from neon_run.cli import check_writable, device_option, json_option, run, write_result
from neon_var import options as o
from neon_var.backbone import VARBackbone
from neon_var.recipes import RECIPES


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--var_ckpt", type=o.FILE, help="Base checkpoint.  [default: the preset's]")
@o.model_options
@click.option("--outdir", "--out_dir", "outdir", required=True, type=o.FOLDER, help="Folder of the set.")
@click.option("--num_images", "--N", "num_images", type=click.IntRange(1), help="In all.  [default: the preset's |S|]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds are seed, seed+1, ...")
@o.batch_option
@click.option("--cfg", type=float, help="Guidance at the last scale.  [default: 1.25 at 256, 2.0 at 512]")
@o.sampler_options
@device_option
@json_option
def main(
    preset, var_ckpt, vae_ckpt, model_depth, compiled, outdir, num_images, seed, batch_size, device, json_path, **flags
) -> None:
    """Make the synthetic set S."""
    recipe = RECIPES[preset]
    settings = o.sampler_settings(flags, dict(recipe.generate))
    num_images = num_images or recipe.num_synthetic
    with session(device) as where, float32_precision(allow_tf32=True):
        checkpoint, vae = o.check_files(var_ckpt or recipe.base, vae_ckpt)
        check_writable(outdir, "--outdir")
        backbone = VARBackbone.load(checkpoint, recipe, where, vae_ckpt=vae, model_depth=model_depth, compiled=compiled)
        backbone.check_settings(**settings)
        manifest = generate_set(
            backbone,
            range(seed, seed + num_images),
            outdir,
            settings=settings,
            batch_size=batch_size or o.BATCH_SIZE[preset],
            provenance={**origin(preset, checkpoint), "vae_sha256": file_hash(vae)},
        )
        line = f"{num_images} images | {outdir} | cfg={settings['cfg']:g} | base={checkpoint.name}"
        write_result({"outdir": str(outdir), **manifest}, line, json_path)


if __name__ == "__main__":
    run(main)
