"""The training data of a fine-tune: the prepared items of a synthetic set, and their labels.

Expensive preparation (a frozen tokenizer) is run once per image, and its output is kept beside the set:
    <set>.prepared/<key>-<digest of the set's content>/part-00012.npy      PART_ITEMS items each
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import agree, barrier, gather_objects, is_main, rank, world_size
from neon_core.seeds import deal, global_batches
from neon_core.synthetic import check_labels
from neon_files.atomic import atomic_path
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar

PART_ITEMS = 1024


class TrainingData:
    """`items(indices)` returns the backbone's `prepare` of those images [B, ...]; `labels` is int64 [n] or None."""

    def __init__(self, items: Callable[[np.ndarray], Tensor], labels: Tensor | None, num_items: int):
        self.items, self.labels, self.num_items = items, labels, num_items

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """(prepared [B, ...] on the CPU, labels [B] or None)."""
        return self.items(indices), None if self.labels is None else self.labels[torch.from_numpy(indices)]


def training_data(
    backbone: Backbone, images: ImageSet, device: torch.device, *, batch_size: int = 64, cache_dir: Path | None = None
) -> TrainingData:
    """The set in the form that `backbone` trains on. Every rank calls it; the cache of a killed run is completed.

    `cache_dir` replaces the default place beside the set. Raises UserError where labels do not fit the network.
    """
    labels = images.class_indices if backbone.num_classes else None
    check_labels(labels, backbone.num_classes)
    if not backbone.prepared_key:
        return TrainingData(lambda items: backbone.prepare(images.images(items)), labels, len(images))

    folder = (
        Path(cache_dir or f"{os.fspath(images.path).rstrip('/')}.prepared") / f"{backbone.prepared_key}-{images.digest}"
    )
    parts = global_batches(len(images), PART_ITEMS)
    paths = [folder / f"part-{number:05d}.npy" for number in range(len(parts))]
    folder.mkdir(parents=True, exist_ok=True)
    finished = gather_objects([number for number, path in enumerate(paths) if _is_whole(path, len(parts[number]))])[0]
    for number in progress_bar(deal(len(parts), rank(), world_size(), finished), desc="prepare", disable=not is_main()):
        rows = []
        for start in range(parts[number].start, parts[number].stop, batch_size):
            items = np.arange(start, min(start + batch_size, parts[number].stop))
            with torch.no_grad():
                rows.append(backbone.prepare(images.images(items).to(device)).cpu())
        with atomic_path(paths[number]) as temporary, open(temporary, "wb") as file:
            np.save(file, torch.cat(rows).numpy(), allow_pickle=False)
    barrier()
    agree(folder, lambda: {path.name: path.stat().st_size for path in paths if path.exists()})
    opened = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]

    def read(indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([opened[i // PART_ITEMS][i % PART_ITEMS] for i in indices]))

    return TrainingData(read, labels, len(images))


def _is_whole(path: Path, num_items: int) -> bool:
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == num_items
    except (OSError, ValueError, EOFError, TypeError):  # missing or damaged: prepared again
        return False
