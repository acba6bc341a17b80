"""What the official scripts do with labels, batches and save points, as pure functions of their settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neon_core.schedules import LinearRamp
from neon_files.errors import UserError


def balanced_labels(num_images: int, num_classes: int, seed: int = 0, remainder_seed: int | None = None) -> Tensor:
    """int64 [num_images]: num_images // num_classes of each class, shuffled by `seed`.

    What does not divide is drawn uniformly from the generator of `remainder_seed` (default `seed`; the official
    script uses seed + rank there, so that its ranks disagree).
    """
    labels = torch.arange(num_classes).repeat_interleave(num_images // num_classes)
    rest = num_images % num_classes
    if rest:
        generator = torch.Generator().manual_seed(seed if remainder_seed is None else remainder_seed)
        labels = torch.cat((labels, torch.randint(0, num_classes, (rest,), generator=generator)))
    return labels[torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))]


def labels_for(label: Tensor | int | None, batch: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """int64 [batch] of the official sampler's `label_B`: drawn where None, one class where int (negative: no class)."""
    if label is None:
        uniform = torch.full((num_classes,), 1 / num_classes, device=generator.device)
        return torch.multinomial(uniform, batch, replacement=True, generator=generator)
    if isinstance(label, int):
        return torch.full((batch,), num_classes if label < 0 else label)
    return label.long()


def epoch_order(num_items: int, batch_size: int, epoch: int, seed: int = 0) -> np.ndarray:
    """The order of one epoch, int64: a permutation padded with its own head to whole batches.

    Below half a batch the head is appended only once, as officially: 2 num_items, one short batch.
    """
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(epoch + seed)).numpy()
    missing = -num_items % batch_size
    return np.concatenate((order, order[:missing]))


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


def global_batches(num_items: int, batch_size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless int64 [batch_size] batches: the official order of one rank, cut anew for any number of ranks.

    A set smaller than half a batch is repeated within the batch until it is full.
    """
    epoch = 0
    while True:
        order = epoch_order(num_items, batch_size, epoch, seed)
        if len(order) < batch_size:
            order = np.resize(order[:num_items], batch_size)
        yield from order.reshape(-1, batch_size)
        epoch += 1


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
