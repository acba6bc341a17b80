"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Recipe
from neon_core.distributed import file_hash
from neon_core.finetune import need_labels, open_set, train_on
from neon_core.schedules import Ema, LinearRamp
from neon_core.synthetic import origin
from neon_files.checkpoint import find_file
from neon_xar.backbone import XARBackbone


def with_settings(
    recipe: Recipe, *, ramp_images: int | None = None, ema_decay: float | None = None, **given: Any
) -> Recipe:
    """`recipe` with those training settings that are not None."""
    changes = {name: value for name, value in given.items() if value is not None}
    if ramp_images is not None:
        changes["schedule"] = LinearRamp(ramp_images)
    if ema_decay is not None:
        changes["ema"] = Ema(decay=ema_decay)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def fine_tune(
    base: str | Path,
    vae_path: str | Path,
    data: str | Path,
    recipe: Recipe,
    out_dir: str | Path,
    *,
    device: torch.device,
    model: str | None = None,
    flip: bool = True,
    **options: Any,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    The moments of every image and its mirror image are computed once and kept beside the set, or in `cache_dir`.
    `options` (cache_dir, seed, mode, activation_checkpointing) go to `train_on`. Raises UserError, before anything is
    trained, where the set is unfinished or does not fit the network.
    """
    images = open_set(data)
    need_labels(images, "xAR")
    backbone = XARBackbone.load(base, recipe, device, vae_path=vae_path, model=model, flip=flip)
    hashes = {"vae_sha256": file_hash(find_file(vae_path))}
    provenance = {**origin(recipe.name, find_file(base)), **hashes, "flip": flip}
    return train_on(images, backbone, recipe.train, out_dir, device=device, provenance=provenance, **options)
