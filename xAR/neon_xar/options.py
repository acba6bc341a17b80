"""Command-line flags that the four scripts share. Official flags that have no effect here are accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from neon_core.seeds import parse_seeds
from neon_run import cli
from neon_run.cli import options
from neon_xar.backbone import DEFAULT_VAE, LABEL_RULES, PRECISIONS, check_model_name, check_settings
from neon_xar.vae import ROUNDINGS

SETTINGS = {"context_settings": {"help_option_names": ["-h", "--help"]}}
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
SEED_BLOCK = 1_000_000


def _model_name(context: click.Context, parameter: click.Parameter, name: str) -> str:
    check_model_name(name)
    return name


def model_option(**more) -> Callable:
    return click.option(
        "--model",
        callback=_model_name,
        help="xar_base, xar_large or xar_huge. A checkpoint that Neon wrote says itself what it is.",
        **more,
    )


def vae_option(**more) -> Callable:
    more = more or {"default": DEFAULT_VAE}
    return click.option("--vae_path", type=FILE, help="The autoencoder.  [default: xAR/pretrained/kl16.ckpt]", **more)


compile_option = click.option("--compile/--no_compile", "compiled", default=False, help="torch.compile the blocks.")
tf32_option = click.option(
    "--tf32/--no_tf32", default=True, show_default=True, help="TF32 products on NVIDIA GPUs, as officially."
)

sampler_options = options(
    click.option("--cfg", type=float, help="Guidance of the last cell.  [default: the recipe's]"),
    click.option("--flow_steps", type=int, help="Network calls per cell, at least 3.  [default: the recipe's]"),
    click.option(
        "--precision",
        type=click.Choice(["auto", *PRECISIONS]),
        default="auto",
        show_default=True,
        help="Of the transformer; auto: fp16 on CUDA, as officially, fp32 on the CPU.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        default="truncate",
        show_default=True,
        help="Of pixels; truncate is what the published FIDs were measured with.",
    ),
    click.option(
        "--labels",
        "label_rule",
        type=click.Choice(LABEL_RULES),
        default="balanced",
        show_default=True,
        help="balanced: class = seed mod number of classes. official: equal blocks in class order.",
    ),
)


def sampler_settings(flags: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of `sampler_options` out of `flags`: settings of `XARBackbone.sample`, checked. What is left at
    its default is left out, so that manifests tell apart only what differs."""
    plain = {"precision": "auto", "rounding": "truncate", "label_rule": "balanced"}
    given = {name: flags.pop(name) for name in ("cfg", "flow_steps", *plain)}
    settings = preset | {name: v for name, v in given.items() if v is not None and v != plain.get(name)}
    check_settings(**settings)
    return settings


def seeds_options(default_images: int | None, default_seed: int) -> Callable:
    """--num_images and --seed, or --seeds; see `chosen_seeds`."""
    return options(
        click.option(
            "--num_images",
            type=click.IntRange(1),
            default=default_images,
            show_default=default_images is not None,
            help="Exactly so many." + ("" if default_images else "  [default: the recipe's |S|]"),
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 4000),
            default=default_seed,
            show_default=True,
            help=f"Image i has the seed {SEED_BLOCK} * this + i.",
        ),
        click.option("--seeds", help="A list like 0-999,5000-5999 instead of these two."),
    )


def chosen_seeds(num_images: int, seed: int, seeds: str | None) -> list[int]:
    """The seeds of a run, one per image."""
    return parse_seeds(seeds) if seeds else list(range(SEED_BLOCK * seed, SEED_BLOCK * seed + num_images))


metric_options = options(
    cli.metric_options("fid,is", ""), click.option("--no_isc", is_flag=True, help="Leave the Inception Score out.")
)

# Processes and devices come from torchrun's environment.
official_options = options(
    click.option("--img_size", type=int, help="Checked against what the model makes.  [default: that]"),
    click.option("--class_num", type=click.IntRange(1), help="Checked against the model's.  [default: that]"),
    click.option("--cuda", is_flag=True, hidden=True),
    click.option("--dist_url", hidden=True),
    click.option("--dist_on_itp", is_flag=True, hidden=True),
    click.option("--world_size", type=int, hidden=True),
    click.option("--local_rank", "--local-rank", type=int, hidden=True),
)
