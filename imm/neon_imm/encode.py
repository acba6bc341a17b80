"""The command of imm/encode.py: images -> moments of their latents."""

from __future__ import annotations

from pathlib import Path

import click

from neon_core.distributed import pick_device
from neon_core.precision import float32_precision
from neon_imm.commands import VAE
from neon_imm.labels import create_labels
from neon_imm.latent_set import encode_images
from neon_imm.latents import VaeCodec
from neon_imm.vae_files import load_vae
from neon_run import flags as f
from neon_run.cli import run
from neon_run.commands import HELP

FLAGS = [
    click.Argument(["word"], type=click.Choice(["encode"]), required=False, expose_value=False),  # the official tool's
    f.flag("--source", required=True, type=f.PATH, help="Images, folder or .zip."),
    f.flag("--dest", required=True, type=f.PATH, help="Zip to write."),
    f.flag("--vae", "--model-url", "vae", metavar="PATH|HUB", help=VAE.help),
    f.flag("--max_images", "--max-images", "max_images", type=f.COUNT, help="Encode only the first ones."),
    f.flag("--labels_from_names", is_flag=True, help="First write dataset.json from names like label7_000012.png."),
    f.flag("--batch_size", "--max_batch_size", "--batch", "batch_size", type=f.COUNT, default=64,
           help="Images read at once."),
    f.DEVICE,
]  # fmt: skip


def encode(
    source: Path,
    dest: Path,
    vae: str | None,
    max_images: int | None,
    labels_from_names: bool,
    batch_size: int,
    device: str,
) -> None:
    """Encode a set in float32, as the official data set tool does."""
    chosen = pick_device(device)
    if labels_from_names:
        create_labels(source)
    with float32_precision("none"):
        autoencoder = load_vae(vae).to(chosen)
        codec = VaeCodec(autoencoder, factor=autoencoder.stride)
        count = encode_images(source, dest, codec, chosen, batch_size=batch_size, max_images=max_images)
    click.echo(f"{dest} | items={count} | source={source}")


def main() -> None:
    """The command on this process's arguments."""
    run(click.Command("encode", params=FLAGS, callback=encode, help=encode.__doc__, context_settings=HELP))
