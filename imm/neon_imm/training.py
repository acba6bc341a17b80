"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from neon_core.finetune import need_labels, open_set, train_on
from neon_core.schedules import Ema
from neon_core.synthetic import origin
from neon_files.errors import UserError
from neon_imm.evaluate import load_backbone
from neon_imm.recipes import IMMRecipe


def with_settings(
    recipe: IMMRecipe, ema_decay: float | None = None, lr: float | None = None, **given: object
) -> IMMRecipe:
    """`recipe` with the training settings that are not None; `ema_decay` 0 means no averaging. The micro batch shrinks
    with the batch where it is not given."""
    changes = {name: value for name, value in given.items() if value is not None}
    batch = changes.get("batch_size")
    if batch is not None and "micro_batch_size" not in changes and batch % recipe.train.micro_batch_size:
        changes["micro_batch_size"] = batch // 8 if batch % (8 * recipe.loss.matrix_size) == 0 else batch
    if lr is not None:
        changes["lr"] = lr
    if ema_decay is not None:
        changes["ema"] = Ema(decay=ema_decay) if ema_decay else None
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def fine_tune(
    base: Path,
    data: Path,
    recipe: IMMRecipe,
    out_dir: Path,
    *,
    device: torch.device,
    seed: int = 0,
    vae: str | None = None,
    compiled: bool = False,
    loss: dict[str, float | None] | None = None,
    xflip: bool = False,
    max_size: int | None = None,
    **options: Any,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    `data`: images, or the zip of their moments. `loss`: settings of `IMMLoss` to change, None leaves one alone.
    `options` (mode, activation_checkpointing) go to `self_train`. Raises UserError, before anything is trained, where
    the set is unfinished or does not fit the network.
    """
    images = open_set(data, max_size=max_size, xflip=xflip, random_seed=seed)
    backbone = load_backbone(base, recipe, device, vae, compiled)
    backbone.use(images)
    backbone.change_loss(**(loss or {}))
    if backbone.num_classes:
        need_labels(images, "this model")
    if recipe.train.micro_batch_size % backbone.loss.matrix_size:
        raise UserError(
            f"--micro_batch_size {recipe.train.micro_batch_size}: must be a multiple of the loss's matrix_size "
            f"{backbone.loss.matrix_size}"
        )
    provenance = {**origin(recipe.name, base), "loss": backbone.config["loss"]}
    return train_on(images, backbone, recipe.train, out_dir, device=device, provenance=provenance, seed=seed, **options)
