"""The flags that only VAR's scripts have, grouped by where their values go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from neon_core.backbone import TrainSettings
from neon_core.schedules import LinearRamp
from neon_files.errors import UserError
from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, COUNT, FILE, POSITIVE, SHARE, flag, parse_finite, precision_flag
from neon_run.row import Row
from neon_var.architectures import ARCHITECTURES
from neon_var.backbone import CROPS, VARBackbone
from neon_var.check import PARTS
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
    flag(
        "--crop", type=click.Choice(CROPS),
        help="Of an image: official, enlarged by 1.125 and cropped at random; none, as it is.  [default: official]",
    ),
)  # fmt: skip
SAMPLE = (
    flag("--cfg", type=float, callback=parse_finite, help="Guidance at the last scale.  [default: the row's]"),
    flag("--top_k", type=click.IntRange(0), help="Draw from the k most probable tokens, 0: all.  [default: 900]"),
    flag("--top_p", type=SHARE, help="Draw from this probability mass, 0: all.  [default: 0.95]"),
    flag("--temperature", type=POSITIVE, callback=parse_finite, help="Of the draw; divides the logits.  [default: 1]"),
    flag("--more_smooth", is_flag=True, help="Soft codes instead of drawn ones; smoother, not for FID."),
    precision_flag("--precision", "Of the transformer; auto: the row's, as officially: fp32 for S, else fp16 on GPUs."),
    precision_flag("--decoder_precision", "Of the VQVAE's decoder; auto, as officially: that of --precision."),
    flag("--official_seeds", is_flag=True,
         help="Labels, and one generator per batch, as in the official script on one process."),
    flag("--rounding", type=click.Choice(["truncate", "nearest"]), default="truncate",
         help="To 8 bits; truncate is official."),
    flag("--decode_batch", type=COUNT, help="Images decoded at once.  [default: the batch]"),
)  # fmt: skip
GENERATE = (
    flag(
        "--tokens/--no_tokens",
        default=None,
        help="Keep S as the tokens that were drawn, which the fine-tune reads as they are.  [default: the row's]",
    ),
)
HALF = {"0": "fp32", "1": "fp16", "2": "bf16"}  # the official numbers of --fp16
TRAIN = (
    flag("--total_images", type=COUNT, help="Official: --images and --ramp_images at once."),
    flag("--fp16", type=click.Choice(list(HALF)), help="Official: --precision fp32, fp16 or bf16."),
)
CHECK = (  # the official train.py builds its network from these; ours comes with the checkpoint
    flag("--saln", type=bool, help="Check: is the AdaLN shared?"),
    flag("--pn", help="Check: 256, 512, or the sides of the token maps, like 1_2_3."),
)
IGNORED = (
    flag("--cuda", is_flag=True, hidden=True),  # without effect in the official script too
    flag("--temp_dir", hidden=True, help="not used, images stay in memory (--save_images keeps them)"),
    flag("--alng", hidden=True, help="not used, it only initialises a network that is then loaded"),
    flag("--workers", hidden=True, help="not used, the next step's images are read while one trains"),
    *(flag(name, hidden=True, help="not used, as in the official loop")
      for name in ("--sche", "--wp", "--wp0", "--wpe", "--twd", "--twde")),
)  # fmt: skip
REFUSED = {
    "--out_dir": "give --json, a file of the result and every setting; VAR/sweep.py keeps all points of a search",
    "--tlr": "give the rate at the end of the ramp as --lr",
    "--tblr": "give --lr, the rate itself: tblr times the batch over all processes, divided by 256",
    "--ep": "lengths are counted in images: give --images",
    "--ac": "give --micro_batch_size; the rest of the batch is accumulated",
    "--ls": "the loss has no label smoothing, as the official 0; leave it out",
    "--tclip": "give --clip_norm",
    "--hflip": "images are not mirrored at random (nor by default officially); --xflip trains on the mirror images too",
    "--tfast": "give --compile",
    "--vfast": "give --compile",
    "--pg": "the fine-tune is not progressive, as the official default; leave it out",
}
OFF = {  # left out, so that equal settings have equal manifests
    "temperature": 1.0,
    "more_smooth": False,
    "tokens": False,
    "official_seeds": False,
    "rounding": "truncate",
}


def train_settings(row: Row, given: Mapping[str, Any]) -> TrainSettings:
    """--total_images is the length and, as in the official script, also the length of the ramp. Raises UserError where
    --fp16 contradicts --precision."""
    if "fp16" in given:
        precision = HALF[given["fp16"]]
        if given.get("precision", precision) != precision:
            raise UserError(f"--fp16 {given['fp16']} is --precision {precision}; give one of them")
        row = replace(row, train=replace(row.train, precision=precision))
    total = given.get("total_images")
    if total is None:
        return row.train
    ramp = LinearRamp(given.get("ramp_images", total))
    return replace(row.train, images=given.get("images", total), schedule=ramp)


def check_claims(backbone: VARBackbone, claims: Mapping[str, Any]) -> None:
    """UserError where --saln or --pn contradicts the network."""
    net = backbone.net
    sides = {"256": ARCHITECTURES["imagenet_256"].patch_nums, "512": ARCHITECTURES["imagenet_512"].patch_nums}
    actual = {
        "saln": backbone.network_config()["kwargs"].get("shared_aln", False),
        "pn": "_".join(map(str, net.patch_nums)),
    }
    given = dict(claims)
    if given.get("pn") in sides:
        given["pn"] = "_".join(map(str, sides[given["pn"]]))
    for name, value in given.items():
        if value != actual[name]:
            raise UserError(
                f"--{name} {claims[name]}: the network has {actual[name]}; leave the flag out or name its network"
            )


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
    generate=GENERATE,
    neutral=OFF,
    unbiased={"cfg": 0.0, "top_k": 0, "top_p": 0.0},
    train=TRAIN,
    train_settings=train_settings,
    check=CHECK,
    check_claims=check_claims,
    ignored=IGNORED,
    refused=REFUSED,
    result_settings=result_settings,
    merge_rule=merge_rule,
    machine_check=PARTS,
)
