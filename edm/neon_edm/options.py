"""Command-line flags that the four scripts share. Where the official scripts spell one flag in two ways, both work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from neon_edm.recipes import RECIPES, EDMRecipe
from neon_files.errors import UserError
from neon_run.cli import options, parse_seed_list

SETTINGS = {"context_settings": {"help_option_names": ["-h", "--help"]}}
FOLDER = click.Path(file_okay=False, path_type=Path)

preset_option = click.option(
    "--preset", type=click.Choice(list(RECIPES)), help="A row of the paper: defaults for every flag left out."
)
tf32_option = click.option(
    "--tf32/--no-tf32", default=False, show_default=True, help="Faster and coarser float32 products on NVIDIA GPUs."
)


def network_option(*names: str, required: bool = True, help: str = "Network: path or URL.") -> Callable:
    """The network under its usual spellings, and `names` before them."""
    return click.option(
        *names, "--network_pkl", "--network", "network", required=required, metavar="PATH|URL", help=help
    )


def seeds_option(default: str | None, help: str, *names: str) -> Callable:
    """A seed list like 0-49999."""
    names = names or ("--seeds", "seeds")
    return click.option(*names, default=default, show_default=default is not None, callback=parse_seed_list, help=help)


def _number(*names: str, default: float | None, help: str, open_at_0: bool = False) -> Callable:
    kind = click.FloatRange(min=0, min_open=open_at_0)
    return click.option(*names, type=kind, default=default, show_default=True, help=help)


sampler_options = options(
    click.option(
        "--class", "class_idx", type=click.IntRange(0), help="One class for all.  [default: a random one each]"
    ),
    click.option(
        "--num_steps",
        "--steps",
        "num_steps",
        type=click.IntRange(2),
        help="Heun steps; 2 N - 1 network calls.  [default: that of the preset, else 18]",
    ),
    _number("--sigma_min", default=0.002, open_at_0=True, help="Lowest noise level."),
    _number("--sigma_max", default=80.0, open_at_0=True, help="Highest noise level."),
    _number("--rho", default=7.0, open_at_0=True, help="Exponent of the time steps."),
    _number("--S_churn", "--s_churn", "S_churn", default=0.0, help="Strength of the noise added on the way; 0: none."),
    _number("--S_min", "--s_min", "S_min", default=0.0, help="Lowest level that gets noise."),
    _number("--S_max", "--s_max", "S_max", default=math.inf, help="Highest level that gets noise."),
    _number("--S_noise", "--s_noise", "S_noise", default=1.0, help="Factor of that noise."),
)


def sampler_settings(flags: dict[str, Any], preset: dict[str, Any] | None = None) -> dict[str, Any]:
    """Take the flags of `sampler_options` out of `flags`: settings of `EDMBackbone.sample`, those without effect left
    out, so that they are not told apart in manifests."""
    names = ("num_steps", "class_idx", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")
    settings = {"num_steps": 18} | (preset or {}) | {n: v for n in names if (v := flags.pop(n)) is not None}
    if settings["sigma_min"] >= settings["sigma_max"]:
        raise UserError(f"--sigma_min {settings['sigma_min']}: must be below --sigma_max {settings['sigma_max']}")
    if settings["S_churn"] == 0:
        settings = {n: v for n, v in settings.items() if not n.startswith("S_")}
    elif math.isinf(settings["S_max"]):
        del settings["S_max"]  # JSON has no infinity
    return settings


# The official train.py builds its network from these; ours comes with the checkpoint, so they are only checked.
network_flags = options(
    click.option("--cond", type=bool, help="Check: is the network class-conditional?"),
    click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), help="Check: the architecture."),
    click.option("--precond", type=click.Choice(["edm", "vp", "ve"]), help="Check: the preconditioner."),
    click.option("--cres", help="Check: width multipliers, like 1,2,2,2."),
    click.option("--nosubdir", is_flag=True, expose_value=False, help="No effect: --outdir is always used as it is."),
)


def preset_or(value: str | None, recipe: EDMRecipe | None, field: str, flag: str) -> str:
    """`value`, or what the preset says; UserError where there is neither."""
    found = value or (getattr(recipe, field) if recipe else None)
    if not found:
        raise UserError(f"{flag} is missing; give it, or a --preset")
    return found
