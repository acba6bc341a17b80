#!/usr/bin/env python3
"""Draw the synthetic set S from a base checkpoint: PNG images with their labels, in EDM's data-set layout.

    torchrun --standalone --nproc_per_node=8 xAR/generate.py --model xar_large --outdir syn/xarl

Settings left out are the paper's for the row. Classes are balanced to within one image for any number of images. A
killed run is continued by the same command, on any number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_core.synthetic import generate_set, origin
from neon_run.cli import batch_option, check_writable, device_option, json_option, run, write_result
from neon_xar import options as o
from neon_xar.backbone import XARBackbone
from neon_xar.evaluate import check_model
from neon_xar.recipes import RECIPES


@click.command(**o.SETTINGS)
@o.model_option(default="xar_base", show_default=True)
@click.option("--model_ckpt", "--base", "model_ckpt", type=o.FILE, help="theta_base.  [default: the recipe's]")
@o.vae_option()
@click.option("--outdir", "--out_dir", "out_dir", type=o.FOLDER, required=True, help="Folder of the set.")
@o.seeds_options(None, default_seed=0)
@click.option("--per_class", type=click.IntRange(1), help="So many images of each class, instead of --num_images.")
@batch_option
@o.sampler_options
@o.official_options
@o.compile_option
@o.tf32_option
@device_option
@json_option
def main(
    model, model_ckpt, vae_path, out_dir, num_images, seed, seeds, per_class, batch_size, img_size, class_num, cuda,
    dist_url, dist_on_itp, world_size, local_rank, compiled, tf32, device, json_path, **flags,
) -> None:  # fmt: skip
    """Make the synthetic set S."""
    recipe = RECIPES[model]
    settings = o.sampler_settings(flags, recipe.generate)
    check_writable(out_dir, "--outdir")
    with session(device) as where, float32_precision(tf32):
        base = XARBackbone.find("--model_ckpt", model_ckpt or recipe.base, model)
        backbone = XARBackbone.load(base, recipe, where, vae_path=vae_path, model=model, compiled=compiled)
        check_model(backbone, img_size, class_num)
        count = per_class * backbone.num_classes if per_class else num_images or recipe.num_synthetic
        manifest = generate_set(
            backbone,
            o.chosen_seeds(count, seed, seeds),
            out_dir,
            settings=settings,
            batch_size=batch_size,
            provenance=origin(recipe.name, base),
        )
        line = f"{manifest['num_images']} images | {out_dir} | cfg={settings['cfg']:g} | steps={settings['flow_steps']}"
        write_result({"outdir": str(out_dir), **manifest}, f"{line} | base={base.name}", json_path)


if __name__ == "__main__":
    run(main)
