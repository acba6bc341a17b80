"""VAR: labels and batches by rank, the training loop's points, progressive stages, validation crops, class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon_core.schedules import LinearRamp
from neon_files.errors import UserError
from neon_var.loss import token_loss
from neon_var.official import epoch_order

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def labels_for(label: Tensor | int | None, batch: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """int64 [batch] of the official sampler's `label_B`: drawn where None, one class where int (negative: no class)."""
    if label is None:
        uniform = torch.full((num_classes,), 1 / num_classes, device=generator.device)
        return torch.multinomial(uniform, batch, replacement=True, generator=generator)
    if isinstance(label, int):
        return torch.full((batch,), num_classes if label < 0 else label)
    return label.long()


def rank_batches(num_items: int, batch_size: int, epoch: int, rank: int, world_size: int, seed: int = 0) -> np.ndarray:
    """int64 [batches, local batch]: what one rank of the official loop sees in one epoch.

    Raises UserError where a rank would get nothing, or the batch does not divide by the ranks.
    """
    if batch_size % world_size:
        raise UserError(f"batch size {batch_size} does not divide by {world_size} ranks")
    order = epoch_order(num_items, batch_size, epoch, seed)
    cuts = torch.linspace(0, len(order), world_size + 1, dtype=torch.int).tolist()
    mine = order[cuts[rank] : cuts[rank + 1]]
    if not len(mine):
        raise UserError(f"{num_items} images are too few for {world_size} ranks: rank {rank} would see none")
    local = min(batch_size // world_size, len(mine))
    return mine.reshape(-1, local)


@dataclass
class OfficialLoop:
    """Learning rate, save points and end of the official fine-tune, step by step, in images seen before the step."""

    batch_size: int
    total_images: int  # 0: no end and a constant rate
    save_interval: int
    lr: float
    images: int = 0
    next_save: int = 0

    def step(self) -> tuple[float, bool] | None:
        """(learning rate, whether a save precedes) of the next step, None at the end."""
        if self.total_images > 0 and self.images >= self.total_images:
            return None
        save = self.images >= self.next_save
        if save:
            self.next_save += self.save_interval
        lr = self.lr * LinearRamp(self.total_images)(self.images) if self.total_images > 0 else self.lr
        self.images += self.batch_size
        return lr, save


@dataclass
class ProgressiveStages:
    """Progressive training: the first prog_si + 1 scales, the newest of them warmed up over `warmup_steps` steps.

    prog_si = -1: all scales. The first stage of a run is not warmed up.
    """

    prog_it: int = 0  # steps in this stage, the present one included
    last_prog_si: int = -1
    first_prog: bool = True

    def step(self, prog_si: int, warmup_steps: float) -> float:
        """Weight of the newest scale in the step that begins."""
        if prog_si != self.last_prog_si:
            if self.last_prog_si != -1:
                self.first_prog = False
            self.last_prog_si, self.prog_it = prog_si, 0
        self.prog_it += 1
        return 1.0 if self.first_prog else max(min(self.prog_it / warmup_steps, 1.0), 0.01)


def progressive_loss(
    logits: Tensor, tokens: Tensor, sizes: list[int], prog_si: int, weight: float, label_smoothing: float = 0
) -> Tensor:
    """`token_loss` in stage prog_si of scales with `sizes` tokens; -1 and the last scale are plain training."""
    newest = (sizes[prog_si], weight) if 0 <= prog_si < len(sizes) - 1 else None
    return token_loss(logits, tokens, sum(sizes), newest, label_smoothing)


def center_crop_offset(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(top, left) of the middle; half margins round to even."""
    return round((height - resolution) / 2), round((width - resolution) / 2)


def crop(images: Tensor, offset: tuple[int, int], resolution: int) -> Tensor:
    """[..., resolution, resolution] at (top, left)."""
    top, left = offset
    return images[..., top : top + resolution, left : left + resolution]


def list_class_folders(root: Path, classes: Sequence[str] | None = None) -> list[tuple[Path, int]]:
    """(file, label) of every picture in `root/<class>/**`: classes and files in string order, label = class position.

    Raises UserError where there is no class folder, or one without a picture.
    """
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if classes is None else list(classes)
    if not names:
        raise UserError(f"{root}: no class folders in it")
    items = []
    for label, name in enumerate(names):
        walk = sorted({path.parent for path in (root / name).rglob("*") if path.is_file()})
        found = [
            path
            for folder in walk
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name.lower().endswith(EXTENSIONS)
        ]
        if not found:
            raise UserError(f"{root / name}: no picture in this class folder ({' '.join(EXTENSIONS)})")
        items += [(path, label) for path in found]
    return items
