"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Recipe
from neon_core.errors import UserError
from neon_core.files.atomic import sha256_file
from neon_core.files.checkpoint import find_file
from neon_core.files.image_set import ImageSet
from neon_core.prepared import training_data
from neon_core.schedules import Ema, LinearRamp
from neon_core.selftrain import self_train
from neon_core.synthetic import read_manifest
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
    seed: int = 0,
    cache_dir: Path | None = None,
    flip: bool = True,
    mode: str = "ddp",
    activation_checkpointing: bool = False,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    The moments of every image and its mirror image are computed once and kept beside the set, or in `cache_dir`.
    Raises UserError, before anything is trained, where the set is unfinished or does not fit the network.
    """
    if Path(data).is_dir():
        read_manifest(data)
    images = ImageSet(data)
    if not images.has_labels:
        raise UserError(f"{images.path}: no labels; xAR needs a dataset.json, or one folder per class")
    backbone = XARBackbone.load(base, recipe, device, vae_path=vae_path, model=model, flip=flip)
    provenance = {
        "recipe": recipe.name,
        "base": find_file(base).name,
        "base_sha256": sha256_file(find_file(base)),
        "vae_sha256": sha256_file(find_file(vae_path)),
        "set": images.digest,
        "flip": flip,
    }
    batches = training_data(backbone, images, device, cache_dir=cache_dir)
    return self_train(
        backbone,
        batches,
        recipe.train,
        out_dir,
        seed=seed,
        device=device,
        provenance=provenance,
        mode=mode,
        activation_checkpointing=activation_checkpointing,
    )
