"""The command-line flags that the IMM scripts share, and the official spellings that mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from neon_files.errors import UserError
from neon_imm.backbone import LABEL_RULES, SAMPLERS, STATES
from neon_imm.precond import PRECISIONS
from neon_imm.recipes import RECIPES, IMMRecipe
from neon_imm.sampler import DISCRETIZATIONS, PRESETS
from neon_run.cli import device_option, options, parse_numbers, parse_seed_list

SETTINGS: dict[str, Any] = {"context_settings": {"help_option_names": ["-h", "--help"]}}
FILE = click.Path(path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(1)


class OrNone(click.ParamType):
    """A number, or the word none."""

    name = "float|none"

    def convert(self, value, param, ctx):
        text = str(value).lower()
        return text if text == "none" else click.FLOAT.convert(value, param, ctx)


preset_option = click.option(
    "--preset",
    default="imagenet_256",
    show_default=True,
    metavar="NAME",
    help=f"A row: {', '.join(RECIPES)}; or an official sampler setting: {', '.join(PRESETS)}.",
)
model_options = options(
    click.option("--vae", metavar="PATH|HUB", help="Autoencoder: folder, file or hub name.  [default: sd-vae-ft-ema]"),
    click.option("--compile", "compiled", is_flag=True, help="Compile the network's blocks: minutes, once."),
    device_option,
)
sampling_options = options(
    click.option("--num_steps", type=COUNT, help="Network steps.  [default here and below: the preset's]"),
    click.option("--cfg", "--cfg_scale", "cfg", type=OrNone(), help="Guidance scale, or none."),
    click.option("--discretization", type=click.Choice(DISCRETIZATIONS), help="Time grid.  [default: uniform]"),
    click.option("--mid_nt", callback=parse_numbers, help="For mid_nt: noise-to-signal ratios, like 1.4."),
    click.option("--sampler", type=click.Choice(SAMPLERS), help="[default: pushforward]"),
    click.option("--precision", type=click.Choice(["fp32", *PRECISIONS]), help="Of the network.  [default: fp32]"),
    click.option("--state", type=click.Choice(list(STATES)), help="Of grid and sample.  [default: float32]"),
    click.option("--label_rule", type=click.Choice(LABEL_RULES), help="Classes in order (default) or seed mod K."),
)  # fmt: skip
SAMPLING = ("num_steps", "cfg", "discretization", "mid_nt", "sampler", "precision", "state", "label_rule")

seed_options = options(
    click.option("--num_images", "--N", "num_images", type=COUNT, help="Seeds 0, 1, ...: one image each."),
    click.option("--per_class_count", type=COUNT, help="Images per class, instead of --num_images."),
    click.option("--seeds", callback=parse_seed_list, help="A list like 0-9999,20000, instead of --num_images."),
)


def row(preset: str) -> IMMRecipe:
    """The recipe of a row, or the one that an official sampler setting belongs to. Raises UserError."""
    if preset in RECIPES:
        return RECIPES[preset]
    if preset in PRESETS:
        return RECIPES["imagenet_256" if PRESETS[preset]["cfg"] is not None else "cifar10"]
    raise UserError(f"--preset {preset}: choose one of {', '.join((*RECIPES, *PRESETS))}")


def sampling_settings(preset: str, defaults: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of `IMMBackbone.sample`: given flags, taken out of `flags`, over an official sampler setting, or over
    the row's `defaults`. Raises UserError where flags contradict each other."""
    given = {name: value for name in SAMPLING if (value := flags.pop(name)) is not None}
    settings = dict(PRESETS.get(preset, defaults)) | given
    if settings.get("cfg") == "none":
        settings["cfg"] = None
    listed = settings.get("discretization", "uniform") == "mid_nt"
    if listed and "num_steps" in given:
        raise UserError("--num_steps does not go with mid_nt, which takes the listed ratios and one step more")
    if "mid_nt" in given and not listed:
        raise UserError("--mid_nt: needs --discretization mid_nt as well")
    if not listed:
        settings.pop("mid_nt", None)
    return settings


def chosen_seeds(
    default: int, num_classes: int, num_images: int | None, per_class_count: int | None, seeds: list[int] | None
) -> list[int]:
    """The run's seeds. Raises UserError where more than one flag says how many."""
    if sum(flag is not None for flag in (num_images, per_class_count, seeds)) > 1:
        raise UserError("--num_images, --per_class_count and --seeds all say how many; give one of them")
    if seeds is not None:
        return seeds
    if per_class_count is not None:
        if not num_classes:
            raise UserError("--per_class_count: this network knows no classes; use --num_images")
        return list(range(per_class_count * num_classes))
    return list(range(num_images or default))


# The official script is configured as key=value; these are the keys that have a flag here.
OVERRIDES = {
    "eval.resume": "--model_ckpt",
    "aux_resume": "--synthetic",
    "neon_w": "--w",
    "per_class_count": "--per_class_count",
    "total_images": "--num_images",
    "fid_stats": "--fid_stats",
    "preset": "--preset",
    "cfg_scale": "--cfg",
    "eval.batch_size": "--batch_size",
    "out_dir": "--save_images",
}


def official_arguments(arguments: Sequence[str]) -> list[str]:
    """`arguments` with hydra's key=value overrides as flags. UserError names one that has no counterpart."""
    found: list[str] = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("+").partition("=")
        follows_flag = bool(found) and found[-1].startswith("-") and "=" not in found[-1]
        if key == "--config-name":
            if "im256" not in value:
                raise UserError(f"{argument}: only the 256 configuration is known; use --preset")
        elif argument.startswith("-") or not equals or follows_flag:
            found.append(argument)
        elif key in OVERRIDES:
            found.append(f"{OVERRIDES[key]}={value}")
        else:
            raise UserError(f"{argument}: this override has no counterpart; known are {', '.join(OVERRIDES)}")
    return found
