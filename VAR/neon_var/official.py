"""The official rules for the merge, labels and batches, as pure functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def merge_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The official merge: in the tensor's dtype, whole numbers too (to float32); a base tensor with any infinity is
    kept whole."""
    return base.clone() if torch.isinf(base).any() else base + w * (base - syn)


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


def epoch_order(num_items: int, batch_size: int, epoch: int, seed: int = 0) -> np.ndarray:
    """The order of one epoch, int64: a permutation padded with its beginning to whole batches.

    Below half a batch the beginning is appended only once, as officially: 2 num_items, one short batch.
    """
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(epoch + seed)).numpy()
    missing = -num_items % batch_size
    return np.concatenate((order, order[:missing]))


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
