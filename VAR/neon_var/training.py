"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Recipe
from neon_core.distributed import file_hash
from neon_core.finetune import need_labels, open_set, train_on
from neon_core.schedules import LinearRamp
from neon_core.synthetic import origin
from neon_files.errors import UserError
from neon_var.backbone import VARBackbone


def with_settings(recipe: Recipe, ramp_images: int | None = None, **given) -> Recipe:
    """`recipe` with the training settings that are not None; the micro batch shrinks with the batch if not given."""
    changes = {name: value for name, value in given.items() if value is not None}
    batch = changes.get("batch_size")
    if batch is not None and "micro_batch_size" not in changes and batch % recipe.train.micro_batch_size:
        changes["micro_batch_size"] = max(batch // 8, 1) if batch % 8 == 0 else batch
    if ramp_images is not None:
        changes["schedule"] = LinearRamp(ramp_images)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def fine_tune(
    base: Path,
    vae: Path,
    data: str | Path,
    recipe: Recipe,
    out_dir: Path,
    *,
    device: torch.device,
    model_depth: int | None = None,
    token_crops: int = 0,
    **options: Any,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    `options` (seed, mode, activation_checkpointing) go to `self_train`. Raises UserError, before anything is trained,
    where the set is unfinished or does not fit the network.
    """
    images = open_set(data)
    need_labels(images, "VAR")
    backbone = VARBackbone.load(base, recipe, device, vae_ckpt=vae, model_depth=model_depth, token_crops=token_crops)
    if min(images.shape[1:]) < 16:
        raise UserError(f"{images.path}: images of shape {images.shape} are too small for the tokenizer")
    provenance = {**origin(recipe.name, base), "vae_sha256": file_hash(vae), "token_crops": token_crops}
    return train_on(images, backbone, recipe.train, out_dir, device=device, provenance=provenance, **options)
