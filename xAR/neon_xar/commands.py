"""The flags of xAR's scripts that are its own, grouped by where their values go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, FILE, flag, parse_finite
from neon_xar.backbone import LABEL_RULES, PRECISIONS
from neon_xar.rows import ROWS
from neon_xar.vae import ROUNDINGS

LOAD = (flag("--vae_path", type=FILE, help="The autoencoder.  [default: xAR/pretrained/kl16.ckpt]"), COMPILE)
LOAD_TRAINING = (
    flag("--flip/--no_flip", default=None, help="Every image mirrored half of the time.  [default: flip]"),
)
SAMPLE = (
    flag("--cfg", type=float, callback=parse_finite, help="Guidance of the last cell.  [default: the row's]"),
    flag("--flow_steps", type=int, help="Network calls per cell, at least 3.  [default: the row's]"),
    flag("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto",
         help="Of the transformer; auto: fp16 on CUDA, as officially, fp32 on the CPU."),
    flag("--rounding", type=click.Choice(ROUNDINGS), default="truncate",
         help="Of pixels; truncate is what the published FIDs were measured with."),
    flag("--labels", "label_rule", type=click.Choice(LABEL_RULES), default="balanced",
         help="balanced: class = seed mod number of classes. official: equal blocks in class order."),
)  # fmt: skip
IGNORED = (  # processes and devices come from torchrun's environment
    flag("--cuda", is_flag=True, hidden=True),
    flag("--dist_url", hidden=True),
    flag("--dist_on_itp", is_flag=True, hidden=True),
    flag("--world_size", type=int, hidden=True),
    flag("--local_rank", "--local-rank", "local_rank", type=int, hidden=True),
)
# Left out, so that manifests tell apart only what differs:
PLAIN = {"precision": "auto", "rounding": "truncate", "label_rule": "balanced"}


def result_settings(result: Mapping[str, Any]) -> list[str]:
    """`cfg=2.7 | steps=50 | ...` as officially."""
    settings = result["settings"]
    parts = [f"cfg={settings['cfg']:g}", f"steps={settings['flow_steps']}", f"n={result['num_images']}"]
    parts += [f"model={result['row'].split('/')[-1]}"] if "row" in result else []
    return parts + ([f"ckpt={Path(result['checkpoint']).stem}"] if "checkpoint" in result else [])


COMMANDS = BackboneCommands(
    name="xar",
    rows=ROWS,
    default="xar_base",
    preset=("--model",),
    checkpoint=("--model_ckpt",),
    base=("--resume",),
    synthetic=("--model_ckpt_aux",),
    load=LOAD,
    load_training=LOAD_TRAINING,
    sample=SAMPLE,
    neutral=PLAIN,
    ignored=IGNORED,
    seed_block=1_000_000,
    search_seeds=("--seeds",),
    result_settings=result_settings,
)
