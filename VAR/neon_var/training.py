"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from neon_core.backbone import Recipe
from neon_core.errors import UserError
from neon_core.files.atomic import sha256_file
from neon_core.files.image_set import ImageSet
from neon_core.prepared import training_data
from neon_core.schedules import LinearRamp
from neon_core.selftrain import self_train
from neon_core.synthetic import read_manifest
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
    seed: int = 0,
    device: torch.device,
    model_depth: int | None = None,
    token_crops: int = 0,
    mode: str = "ddp",
    activation_checkpointing: bool = False,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    Raises UserError, before anything is trained, where the set is unfinished or does not fit the network.
    """
    if Path(data).is_dir():
        read_manifest(data)
    images = ImageSet(data)
    backbone = VARBackbone.load(base, recipe, device, vae_ckpt=vae, model_depth=model_depth, token_crops=token_crops)
    if not images.has_labels:
        raise UserError(f"{images.path}: no labels; VAR needs a dataset.json, or one folder per class")
    if min(images.shape[1:]) < 16:
        raise UserError(f"{images.path}: images of shape {images.shape} are too small for the tokenizer")
    provenance = {
        "recipe": recipe.name,
        "base": base.name,
        "base_sha256": sha256_file(base),
        "vae_sha256": sha256_file(vae),
        "set": images.digest,
        "token_crops": token_crops,
    }
    batches = training_data(backbone, images, device)
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
