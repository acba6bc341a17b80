#!/usr/bin/env python3
"""Draw the synthetic set S from the base network: PNG images with their labels, in EDM's data-set layout.

    python edm/generate.py --preset cifar10_cond --outdir datasets/cifar10/ns6k
    torchrun --standalone --nproc_per_node=8 edm/generate.py --network base.pkl --seeds 0-17999 --steps 40 --outdir S

A killed run is continued by the same command. Conditional networks get a random class for each image.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_core.synthetic import generate_set, origin
from neon_edm import options as o
from neon_edm.backbone import EDMBackbone
from neon_edm.recipes import RECIPES
from neon_files.downloads import fetch
from neon_run.cli import batch_option, check_writable, device_option, json_option, run, write_result


@click.command(**o.SETTINGS)
@o.preset_option
@o.network_option(required=False, help="Base network: path or URL.  [default: that of the preset]")
@click.option("--outdir", required=True, type=o.FOLDER, help="Folder of the set.")
@o.seeds_option(None, "One image each.  [default: as many as the preset says, else 0-63]")
@click.option("--subdirs", is_flag=True, help="A subfolder for every 1000 seeds.")
@batch_option
@o.sampler_options
@o.tf32_option
@device_option
@json_option
def main(preset, network, outdir, seeds, subdirs, batch_size, tf32, device, json_path, **flags) -> None:
    """Make the synthetic set S."""
    recipe = RECIPES.get(preset)
    settings = o.sampler_settings(flags, recipe and recipe.generate)
    seeds = seeds or list(range(recipe.num_synthetic if recipe else 64))
    network = o.preset_or(network, recipe, "base", "--network")
    with session(device) as where, float32_precision(tf32):
        path = fetch(network)
        backbone = EDMBackbone.load(path, None, where)
        check_writable(outdir, "--outdir")
        manifest = generate_set(
            backbone,
            seeds,
            outdir,
            settings=settings,
            batch_size=batch_size,
            provenance=origin(preset, path),
            subfolders=subdirs,
        )
        line = f"{len(seeds)} images | {outdir} | steps={settings['num_steps']} | base={path.name}"
        write_result({"outdir": str(outdir), **manifest}, line, json_path)


if __name__ == "__main__":
    run(main)
