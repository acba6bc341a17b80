"""A fine-tune from the files of a set to the snapshots: the last call of every finetune.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Backbone, TrainSettings
from neon_core.distributed import agree
from neon_core.prepared import training_data
from neon_core.selftrain import self_train
from neon_files.errors import UserError
from neon_files.image_set import ImageSet


def open_set(data: str | Path, **options: Any) -> ImageSet:
    """The images of a set, the same on every rank, which all call it; with `options` of ImageSet. Raises UserError."""
    return agree(data, lambda: ImageSet(data, **options), lambda s: f"{len(s)} images (digest {s.digest})")


def need_labels(images: ImageSet, reader: str) -> None:
    """UserError where the set has no labels, saying that `reader` needs them."""
    if not images.has_labels:
        raise UserError(f"{images.path}: no labels; {reader} needs a dataset.json, or one folder per class")


def train_on(
    images: ImageSet,
    backbone: Backbone,
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    device: torch.device,
    provenance: dict[str, Any],
    cache_dir: Path | None = None,
    **options: Any,
) -> dict[int, Path]:
    """Images seen -> snapshot of `backbone`, trained on `images` in place. Every rank calls it; an earlier run in
    `out_dir` is continued.

    `provenance` (everything else that the weights depend on) goes into the snapshots, with the digest of
    the set. `cache_dir`: see `training_data`; `options` (seed, mode, name ...): see `RunOptions`.
    Raises UserError.
    """
    if settings.micro_batch_size % backbone.micro_batch_multiple:
        raise UserError(
            f"--micro_batch_size {settings.micro_batch_size}: must be a multiple of {backbone.micro_batch_multiple}, "
            "which this loss takes together"
        )
    provenance = {**provenance, "set": images.digest}
    data = training_data(backbone, images, device, cache_dir=cache_dir)
    return self_train(backbone, data, settings, out_dir, device=device, provenance=provenance, **options)
