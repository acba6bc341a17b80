"""The flags that only EDM's scripts have, grouped by where their values go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema
from neon_edm import official
from neon_edm.backbone import EDMBackbone
from neon_edm.check import PARTS
from neon_edm.layers import FourierEmbedding
from neon_edm.networks import SongUNet
from neon_edm.rows import ANY_NETWORK, ROWS, SNAPSHOT_TICKS, TICK_IMAGES
from neon_files.errors import UserError
from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, COUNT, POSITIVE, SHARE, flag, precision_flag
from neon_run.row import Row

NOT_NEGATIVE = click.FloatRange(min=0)
SAMPLE = (
    flag("--class", "class_idx", type=click.IntRange(0), help="One class for all.  [default: a random one each]"),
    flag("--num_steps", "--steps", "num_steps", type=click.IntRange(2),
         help="Heun steps; 2 N - 1 network calls.  [default: the row's, else 18]"),
    flag("--sigma_min", type=POSITIVE, help="Lowest noise level.  [default: 0.002]"),
    flag("--sigma_max", type=POSITIVE, help="Highest noise level.  [default: 80]"),
    flag("--rho", type=POSITIVE, help="Exponent of the time steps.  [default: 7]"),
    flag("--S_churn", "--s_churn", "S_churn", type=NOT_NEGATIVE, help="Strength of noise added on the way; 0: none."),
    flag("--S_min", "--s_min", "S_min", type=NOT_NEGATIVE, help="Lowest level that gets noise.  [default: 0]"),
    flag("--S_max", "--s_max", "S_max", type=NOT_NEGATIVE, help="Highest level that gets noise.  [default: inf]"),
    flag("--S_noise", "--s_noise", "S_noise", type=NOT_NEGATIVE, help="Factor of that noise.  [default: 1]"),
    precision_flag("--precision", "Of the U-Net; auto: fp16 on GPUs where the checkpoint says so, else fp32."),
)  # fmt: skip
LOAD_TRAINING = (
    flag("--dropout", type=SHARE, help="Dropout probability."),
    flag("--augment", type=SHARE, help="Probability of each augmentation; 0: none."),
)
TRAIN = (
    flag("--duration", type=POSITIVE, help="Length, millions of images."),
    flag("--ema", type=POSITIVE, help="Half-life of the weight average, millions of images."),
    flag("--tick", type=COUNT, help="Length of a tick, thousands of images."),
    flag("--snap", type=COUNT, help="Ticks between snapshots."),
)
# The official train.py builds its network from these; ours comes with the checkpoint, so they are only checked.
CHECK = (
    flag("--cond", type=bool, help="Check: is the network class-conditional?"),
    flag("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]), help="Check: the architecture."),
    flag("--precond", type=click.Choice(["edm", "vp", "ve"]), help="Check: the preconditioner."),
    flag("--cbase", type=COUNT, help="Check: base width of --cres."),
    flag("--cres", help="Check: width multipliers, like 1,2,2,2."),
)
IGNORED = (
    flag("--nosubdir", is_flag=True, hidden=True),  # --outdir is always used as it is
    flag("--desc", hidden=True, help="not used, --outdir names the folder"),
    flag("--bench", hidden=True),
    flag("--cache", hidden=True),
    flag("--workers", hidden=True, help="not used, the next step's images are read while one trains"),
    flag("--dump", hidden=True, help="not used, the state is kept at every snapshot and every ten minutes"),
)
_NO_ABLATION = "the ablation sampler has no flags (the official script fails with them); leave it out"
REFUSED = {
    "--fp16": "give --precision fp16; without it the fine-tune has full precision",
    "--ls": "losses are not scaled, as the official 1; leave it out",
    "--resume": "the same command continues a killed fine-tune in --outdir; leave it out",
    "--dry-run": "leave it out; files and settings are checked before the first step",
    "--nearest_k": "precision and recall have k = 5, as the official default; leave it out",
    "--real_data_dir": "give --real_images, with --metrics fid,prdc",
    "--gen_dir": "images stay in memory; --save_images keeps them",
    **dict.fromkeys(("--solver", "--disc", "--schedule", "--scaling"), _NO_ABLATION),
}


def sampler_settings(chosen: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without effect are left out, so that equal samplers have equal manifests."""
    if not chosen.get("S_churn"):
        return {name: value for name, value in chosen.items() if not name.startswith("S_")}
    if math.isinf(chosen.get("S_max", 0.0)):
        del chosen["S_max"]  # JSON has no infinity
    return chosen


def train_settings(row: Row, given: Mapping[str, Any]) -> TrainSettings:
    """Lengths in millions, and snapshots after whole ticks, as the official train.py; a row whose snapshots are not
    counted in ticks keeps them until --tick or --snap is given. Raises UserError where flags contradict each other."""
    train = row.train
    ticks_given = "tick" in given or "snap" in given
    if ticks_given and "snapshot_images" in given:
        raise UserError("--snapshot_images, and --tick or --snap, both set the snapshots; give one of them")
    if "duration" in given and "images" in given:
        raise UserError("--duration and --images both set the length; give one of them")
    images = official.duration_images(given["duration"]) if "duration" in given else train.images
    if "ema" in given and "ema_decay" in given:
        raise UserError("--ema and --ema_decay both set the average of the weights; give one of them")
    if "ema" in given:
        train = replace(train, ema=Ema(halflife_images=official.kimg(given["ema"])))
    if isinstance(train.snapshot_images, int) and not ticks_given:
        return replace(train, images=images)
    tick_images = 1000 * given["tick"] if "tick" in given else TICK_IMAGES
    ticks = given.get("snap", SNAPSHOT_TICKS.get(row.name, 10))
    snapshots, _ = official.snapshot_images(images, train.batch_size, tick_images, ticks)
    return replace(train, images=images, snapshot_images=tuple(snapshots))


def check_claims(backbone: EDMBackbone, claims: Mapping[str, Any]) -> None:
    """UserError where one of --cond, --arch, --precond, --cbase, --cres contradicts the network."""
    config, unet = backbone.network_config(), backbone.net.model
    song = "ncsnpp" if isinstance(getattr(unet, "map_noise", None), FourierEmbedding) else "ddpmpp"
    widths = config["kwargs"].get("channel_mult")
    actual = {
        "cond": backbone.num_classes > 0,
        "arch": song if isinstance(unet, SongUNet) else "adm",
        "precond": config["class"].removesuffix("Precond").lower(),
        "cbase": config["kwargs"].get("model_channels"),
        "cres": None if widths is None else ",".join(map(str, widths)),
    }
    for name, value in claims.items():
        if actual[name] is not None and value != actual[name]:
            raise UserError(f"--{name} {value}: the network has {actual[name]}; leave the flag out or name its network")


def result_settings(result: Mapping[str, Any]) -> list[str]:
    """`conditional | steps=18`, as the official script."""
    conditional = "conditional" if result["network_config"]["kwargs"].get("label_dim") else "unconditional"
    return [conditional, f"steps={result['settings']['num_steps']}"]


COMMANDS = BackboneCommands(
    name="edm",
    rows=ROWS,
    without_row=ANY_NETWORK,
    checkpoint=("--network_pkl", "--network"),
    base=("--transfer", "--network_pkl_base"),
    load=(COMPILE,),
    synthetic=("--network_pkl_aux_file",),
    load_training=LOAD_TRAINING,
    sample=SAMPLE,
    sampler_settings=sampler_settings,
    train=TRAIN,
    train_settings=train_settings,
    check=CHECK,
    check_claims=check_claims,
    ignored=IGNORED,
    refused=REFUSED,
    search_seeds=("--seeds_test",),
    final_seeds=("--seeds",),
    result_settings=result_settings,
    digits=6,
    metrics="fid",
    merge_rule=official.merge_rule,
    machine_check=PARTS,
)
