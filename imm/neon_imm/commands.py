"""The flags that only IMM's scripts have, grouped by where their values go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from neon_files.errors import UserError
from neon_imm.backbone import LABEL_RULES, SAMPLERS, STATES
from neon_imm.check import PARTS
from neon_imm.official import merge_rule, official_arguments
from neon_imm.rows import ROWS, official_presets
from neon_imm.sampler import DISCRETIZATIONS
from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, COUNT, flag, parse_numbers, precision_flag


class OrNone(click.ParamType):
    """A number, or the word none."""

    name = "float|none"

    def convert(self, value, param, ctx):
        text = str(value).lower()
        return text if text == "none" else click.FLOAT.convert(value, param, ctx)


VAE = flag("--vae", metavar="PATH|HUB", help="Autoencoder: folder, file or hub name.  [default: sd-vae-ft-ema]")
LOAD = (VAE, COMPILE)
LOAD_TRAINING = (
    flag("--k", type=click.FloatRange(0), help="Of the loss: r lies 2^-k of the noise range below t."),
    flag("--matrix_size", type=click.IntRange(2), help="Of the loss: samples that share their times."),
)
SAMPLE = (
    flag("--num_steps", type=COUNT, help="Network steps.  [default here and below: the row's]"),
    flag("--cfg", "--cfg_scale", "cfg", type=OrNone(), help="Guidance scale, or none."),
    flag("--discretization", type=click.Choice(DISCRETIZATIONS), help="Time grid.  [default: uniform]"),
    flag("--mid_nt", callback=parse_numbers, help="For mid_nt: noise-to-signal ratios, like 1.4."),
    flag("--sampler", type=click.Choice(SAMPLERS), help="[default: pushforward]"),
    precision_flag("--precision", "Of the network; auto, as officially: fp32."),
    precision_flag("--decoder_precision", "Of the autoencoder; auto: fp16 on GPUs, as officially, fp32 on CPUs."),
    flag("--state", type=click.Choice(list(STATES)), help="Of grid and sample.  [default: float32]"),
    flag("--label_rule", type=click.Choice(LABEL_RULES),
         help="Classes in order, as officially, or seed mod K.  [default: in order for S, seed mod K for the FID]"),
)  # fmt: skip


def sampler_settings(chosen: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError where flags contradict each other."""
    if chosen.get("cfg") == "none":
        chosen["cfg"] = None
    listed = chosen.get("discretization", "uniform") == "mid_nt"
    if listed and "num_steps" in given:
        raise UserError("--num_steps contradicts mid_nt, whose steps are the listed ratios and one more")
    if "mid_nt" in given and not listed:
        raise UserError("--mid_nt: needs --discretization mid_nt as well")
    return {name: value for name, value in chosen.items() if listed or name != "mid_nt"}


def result_settings(result: Mapping[str, Any]) -> list[str]:
    """The settings that the metrics depend on."""
    settings = result["settings"]
    steps = settings.get("num_steps", 8)
    if settings.get("discretization") == "mid_nt":
        steps = 1 + len(settings.get("mid_nt", ()))
    parts = [f"images={result['num_images']}", f"steps={steps}", f"cfg={settings.get('cfg')}"]
    parts += [] if result.get("w") is None else [f"w={result['w']:g}"]
    return parts + ([f"ckpt={Path(result['checkpoint']).stem}"] if "checkpoint" in result else [])


COMMANDS = BackboneCommands(
    name="imm",
    rows=ROWS,
    default="imagenet_256",
    default_fid="imagenet_256",
    more_presets=official_presets(),
    checkpoint=("--model_ckpt", "--network_pkl", "--network"),
    load=LOAD,
    load_training=LOAD_TRAINING,
    sample=SAMPLE,
    unbiased={"cfg": None},
    sampler_settings=sampler_settings,
    words=official_arguments,
    result_settings=result_settings,
    digits=6,
    merge_rule=merge_rule,
    machine_check=PARTS,
)
