"""Command-line flags that the scripts share. Where the official scripts spell one otherwise, both spellings work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neon_files.checkpoint import find_file
from neon_files.errors import UserError
from neon_run.cli import batch_size_option, options
from neon_var.backbone import AUTOCAST
from neon_var.loading import find_vae
from neon_var.recipes import RECIPES

SETTINGS = {"context_settings": {"help_option_names": ["-h", "--help"]}}
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
SAMPLER_FLAGS = ("cfg", "top_k", "top_p", "more_smooth", "precision", "official_seeds", "rounding", "decode_batch")

preset_option = click.option(
    "--preset", type=click.Choice(list(RECIPES)), default="imagenet_256", show_default=True, help="The paper's row."
)
model_options = options(
    click.option("--vae_ckpt", type=FILE, help="The VQVAE.  [default: checkpoints/vae_ch160v4096z32.pth]"),
    click.option(
        "--model_depth",
        "--depth",
        "model_depth",
        type=click.IntRange(1),
        help="Blocks.  [default: 16 at 256, 36 at 512]",
    ),
    click.option(
        "--compile/--no_compile", "compiled", default=False, show_default=True, help="torch.compile the blocks."
    ),
)
sampler_options = options(
    click.option("--top_k", type=click.IntRange(0), help="Draw among that many tokens, 0: all.  [default: 900]"),
    click.option("--top_p", type=click.FloatRange(0, 1), help="Draw within that mass, 0: all.  [default: 0.95]"),
    click.option("--more_smooth", is_flag=True, help="Soft codes instead of drawn ones; smoother, not for FID."),
    click.option(
        "--precision",
        type=click.Choice(["auto", *AUTOCAST]),
        default="auto",
        show_default=True,
        help="Of the sampler; auto: fp16 on GPUs, fp32 on CPUs.",
    ),
    click.option(
        "--official_seeds",
        is_flag=True,
        help="Labels and one generator per batch as the official script has them on one process.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["truncate", "nearest"]),
        default="truncate",
        show_default=True,
        help="To 8 bits; truncate is official.",
    ),
    click.option("--decode_batch", type=click.IntRange(1), help="Images decoded at once.  [default: the batch]"),
    click.option("--cuda", is_flag=True, hidden=True),  # official, without effect there too
)


batch_option = batch_size_option(None, "  [default: 64 at 256, 32 at 512]")
BATCH_SIZE = {"imagenet_256": 64, "imagenet_512": 32}  # 512: about 60 of 80 GB, most of it keys and values


def sampler_settings(flags: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of `sampler_options` out of `flags`: settings of `VARBackbone.sample`. What is left at "off" or
    "auto" is left out, so that manifests tell apart only what differs."""
    flags.pop("cuda", None)
    given = {name: flags.pop(name, None) for name in SAMPLER_FLAGS}
    off = {"more_smooth": False, "precision": "auto", "official_seeds": False, "rounding": "truncate"}
    return preset | {name: value for name, value in given.items() if value is not None and value != off.get(name)}


def check_img_size(img_size: int | None, wanted: int) -> None:
    """UserError where --img_size is not the side of the images that will be made."""
    if img_size is not None and img_size != wanted:
        raise UserError(f"--img_size {img_size}: this script and checkpoint make images of {wanted} pixels a side")


def check_files(checkpoint: str | Path | None, vae: str | Path | None, flag: str = "--var_ckpt") -> tuple[Path, Path]:
    """(checkpoint, VQVAE), both there. Raises UserError within milliseconds, before any model is built."""
    if checkpoint is None:
        raise UserError(
            f"{flag} is missing; name a VAR checkpoint, or fetch the published ones: bash download_models.sh"
        )
    return find_file(checkpoint), find_file(find_vae(vae))
