"""The flags of VAR's scripts that are its own, grouped by where their values go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from neon_core.backbone import TrainSettings
from neon_core.schedules import LinearRamp
from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, COUNT, FILE, SHARE, flag, parse_finite
from neon_run.row import Row
from neon_var.backbone import AUTOCAST
from neon_var.official import merge_rule
from neon_var.rows import ROWS

LOAD = (
    flag("--vae_ckpt", type=FILE, help="The VQVAE.  [default: checkpoints/vae_ch160v4096z32.pth]"),
    flag("--model_depth", "--depth", "model_depth", type=COUNT, help="Blocks.  [default: 16 at 256, 36 at 512]"),
    COMPILE,
)
LOAD_TRAINING = (
    flag(
        "--token_crops", type=click.IntRange(0),
        help="Fixed crops per image, whose tokens are kept on disk; 0 (default): a new random crop at every visit.",
    ),
)  # fmt: skip
SAMPLE = (
    flag("--cfg", type=float, callback=parse_finite, help="Guidance at the last scale.  [default: the row's]"),
    flag("--top_k", type=click.IntRange(0), help="Draw among that many tokens, 0: all.  [default: 900]"),
    flag("--top_p", type=SHARE, help="Draw within that mass, 0: all.  [default: 0.95]"),
    flag("--more_smooth", is_flag=True, help="Soft codes instead of drawn ones; smoother, not for FID."),
    flag("--precision", type=click.Choice(["auto", *AUTOCAST]), default="auto",
         help="Of the sampler; auto: fp16 on GPUs, fp32 on CPUs."),
    flag("--official_seeds", is_flag=True,
         help="Labels and one generator per batch as the official script has them on one process."),
    flag("--rounding", type=click.Choice(["truncate", "nearest"]), default="truncate",
         help="To 8 bits; truncate is official."),
    flag("--decode_batch", type=COUNT, help="Images decoded at once.  [default: the batch]"),
)  # fmt: skip
TRAIN = (flag("--total_images", type=COUNT, help="Official: --images and --ramp_images at once."),)
IGNORED = (
    flag("--cuda", is_flag=True, hidden=True),  # without effect in the official script too
    flag("--temp_dir", hidden=True, help="not used, images stay in memory (--save_images keeps them)"),
)
OFF = {  # left out, so that manifests tell apart only what differs
    "more_smooth": False,
    "precision": "auto",
    "official_seeds": False,
    "rounding": "truncate",
}


def train_settings(row: Row, given: Mapping[str, Any]) -> TrainSettings:
    """--total_images is the length and, as in the official script, also the length of the ramp."""
    total = given.get("total_images")
    if total is None:
        return row.train
    ramp = LinearRamp(given.get("ramp_images", total))
    return replace(row.train, images=given.get("images", total), schedule=ramp)


def result_settings(result: Mapping[str, Any]) -> list[str]:
    """One line in the official layout."""
    parts = [f"cfg={result['settings']['cfg']:g}", f"N={result['num_images']}"]
    parts.append(f"depth={result['network_config']['kwargs']['depth']}")
    return parts + ([f"ckpt={Path(result['checkpoint']).stem}"] if "checkpoint" in result else [])


COMMANDS = BackboneCommands(
    name="var",
    rows=ROWS,
    default="imagenet_256",
    checkpoint=("--var_ckpt",),
    base=("--resume",),
    synthetic=("--var_aux",),
    load=LOAD,
    load_training=LOAD_TRAINING,
    sample=SAMPLE,
    neutral=OFF,
    train=TRAIN,
    train_settings=train_settings,
    ignored=IGNORED,
    result_settings=result_settings,
    merge_rule=merge_rule,
)
