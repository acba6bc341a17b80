#!/usr/bin/env python3
"""Write the synthetic set S: images of the base with its own sampler, lossless, with labels and a manifest.

    torchrun --standalone --nproc_per_node=8 imm/generate.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --outdir datasets/imm256/ns30k

A killed run is continued by the same command, on any number of processes. Then: imm/finetune.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_core.synthetic import generate_set, origin
from neon_files.checkpoint import find_file
from neon_imm import options as o
from neon_imm.evaluate import load_backbone
from neon_run.cli import batch_option, check_writable, json_option, run, write_result


@click.command(**o.SETTINGS)
@o.preset_option
@click.option("--network", "--model_ckpt", "network", type=o.FILE, help="theta_base.  [default: the preset's]")
@click.option("--outdir", "--out_dir", "outdir", required=True, type=o.FOLDER, help="Folder of the set.")
@o.seed_options
@batch_option
@o.sampling_options
@o.model_options
@json_option
def main(
    preset, network, outdir, num_images, per_class_count, seeds, batch_size, vae, compiled, device, json_path, **flags,
) -> None:  # fmt: skip
    """Sample S (30,000 images, 8 steps, guidance 1.5, if not said otherwise)."""
    recipe = o.row(preset)
    settings = o.sampling_settings(preset, recipe.generate, flags)
    with session(device) as where, float32_precision(allow_tf32=True):
        base = find_file(network or recipe.base)
        check_writable(outdir, "--outdir")
        backbone = load_backbone(base, recipe, where, vae, compiled)
        backbone.check_settings(**settings)
        seeds = o.chosen_seeds(recipe.num_synthetic, backbone.num_classes, num_images, per_class_count, seeds)
        provenance = origin(recipe.name, base)
        made = generate_set(backbone, seeds, outdir, settings=settings, batch_size=batch_size, provenance=provenance)
        write_result(made, f"{outdir} | images={len(seeds)} | {settings} | base={base.name}", json_path)


if __name__ == "__main__":
    run(main)
