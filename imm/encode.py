#!/usr/bin/env python3
"""Images -> moments of their latents, in the official zip, which imm/finetune.py reads like the images themselves.

python imm/encode.py --source datasets/imm256/ns30k --dest datasets/imm256/ns30k.zip
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm, neon_core: run without installing

import click

from neon_core.distributed import pick_device
from neon_core.precision import float32_precision
from neon_imm import options as o
from neon_imm.labels import create_labels
from neon_imm.latent_set import encode_images
from neon_imm.latents import VaeCodec
from neon_imm.vae_files import load_vae
from neon_run.cli import batch_option, device_option, run


@click.command(**o.SETTINGS)
@click.option("--source", required=True, type=o.FILE, help="Images, folder or .zip.")
@click.option("--dest", required=True, type=o.FILE, help="Zip to write.")
@click.option("--vae", metavar="PATH|HUB", help="Autoencoder: folder, file or hub name.  [default: sd-vae-ft-ema]")
@click.option("--max_images", type=o.COUNT, help="Encode only the first ones.")
@click.option("--labels_from_names", is_flag=True, help="First write dataset.json from names like label7_000012.png.")
@batch_option
@device_option
def main(source, dest, vae, max_images, labels_from_names, batch_size, device) -> None:
    """Encode a set in float32, as the official data set tool does."""
    where = pick_device(device)
    if labels_from_names:
        create_labels(source)
    with float32_precision(allow_tf32=False):
        autoencoder = load_vae(vae).to(where)
        codec = VaeCodec(autoencoder, factor=autoencoder.stride)
        count = encode_images(source, dest, codec, where, batch_size=batch_size, max_images=max_images)
    click.echo(f"{dest} | items={count} | source={source}")


if __name__ == "__main__":
    run(main)
