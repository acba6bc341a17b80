"""The flags that only xAR's scripts have, grouped by where their values go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from neon_files.errors import UserError
from neon_run.backbones import BackboneCommands
from neon_run.flags import COMPILE, COUNT, FILE, flag, parse_finite, precision_flag
from neon_xar.backbone import LABEL_RULES, XARBackbone
from neon_xar.check import PARTS
from neon_xar.rows import ROWS
from neon_xar.vae import ROUNDINGS

LOAD = (flag("--vae_path", type=FILE, help="The autoencoder.  [default: xAR/pretrained/kl16.ckpt]"), COMPILE)
LOAD_TRAINING = (
    flag("--flip/--no_flip", default=None, help="Every image mirrored half of the time.  [default: flip]"),
)
SAMPLE = (
    flag("--cfg", type=float, callback=parse_finite, help="Guidance of the last cell.  [default: the row's]"),
    flag("--flow_steps", type=int, help="Network calls per cell, at least 3.  [default: the row's]"),
    precision_flag("--precision", "Of the transformer; auto: fp16 on GPUs, as officially, fp32 on CPUs."),
    precision_flag("--decoder_precision", "Of the autoencoder; auto, as officially: that of --precision."),
    flag("--rounding", type=click.Choice(ROUNDINGS),
         help="Of pixels.  [default: the row's, which for the published FIDs is truncate]"),
    flag("--labels", "label_rule", type=click.Choice(LABEL_RULES), default="balanced",
         help="balanced: class = seed mod number of classes. official: equal blocks in class order."),
)  # fmt: skip
CHECK = (  # the official train_new.py builds its network from these; ours has them in the checkpoint
    flag("--img_size", type=COUNT, help="Check: side of the images, pixels."),
    flag("--vae_embed_dim", type=COUNT, help="Check: channels of the latents."),
    flag("--vae_stride", type=COUNT, help="Check: pixels per latent."),
    flag("--patch_size", type=COUNT, help="Check: latents per token, each way."),
)
IGNORED = (  # processes and devices come from torchrun's environment
    flag("--cuda", is_flag=True, hidden=True),
    flag("--dist_url", hidden=True),
    flag("--dist_on_itp", is_flag=True, hidden=True),
    flag("--world_size", type=int, hidden=True),
    flag("--local_rank", "--local-rank", "local_rank", type=int, hidden=True),
    flag("--class_map", hidden=True, help="not used, classes are numbered as in the sorted map, and named so in files"),
    flag("--lr_schedule", hidden=True, help="not used, as in the official loop"),
    flag("--num_workers", hidden=True, help="not used, the next step's images are read while one trains"),
    flag("--pin_mem", "--no_pin_mem", "pin_mem", is_flag=True, hidden=True),
    flag("--out_dir", "images_dir", hidden=True, help="not used, images stay in memory (--save_images keeps them)"),
)
REFUSED = {
    "--blr": "give --lr, the rate itself: blr times the batch over all processes, divided by 256. Note that "
             "--batch_size is that batch here, not the batch of one process",
    "--epochs": "lengths are counted in images: give --images",
    "--warmup_epochs": "lengths are counted in images: give --ramp_images",
    "--min_lr": "the rate ends with the ramp (--ramp_images), there is no decay; leave it out",
    "--epoch_save_freq": "give --snapshot_images",
    "--out_dir_fid": "give --json, a file of the result and every setting; xAR/sweep.py keeps all points of a search",
    "--use_cached": "moments are always computed once and kept, in --cached_path or beside the set; leave it out",
    "--attn_dropout": "the fine-tune has the official 0.1; leave it out",
    "--proj_dropout": "the fine-tune has the official 0.1; leave it out",
    "--label_drop_prob": "the fine-tune has the official 0.1; leave it out",
}  # fmt: skip
# Left out, so that equal settings have equal manifests:
PLAIN = {"rounding": "truncate", "label_rule": "balanced"}


def check_claims(backbone: XARBackbone, claims: Mapping[str, Any]) -> None:
    """UserError where --img_size, --vae_embed_dim, --vae_stride or --patch_size contradicts the network."""
    autoencoder = backbone.autoencoder
    actual = {
        "img_size": backbone.img_size,
        "vae_embed_dim": autoencoder.embed_dim,
        "vae_stride": autoencoder.stride,
        "patch_size": 1,
    }
    for name, value in claims.items():
        if value != actual[name]:
            raise UserError(f"--{name} {value}: the network has {actual[name]}; leave the flag out")


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
    unbiased={"cfg": 1.0},
    check=CHECK,
    check_claims=check_claims,
    ignored=IGNORED,
    refused=REFUSED,
    seed_block=1_000_000,
    search_seeds=("--seeds",),
    result_settings=result_settings,
    machine_check=PARTS,
)
