"""The order in which a fine-tune visits the set: endless, global (all ranks together), a function of the seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def shuffled_epochs(num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """int64 [batch_size] batches of freshly shuffled passes over all items; batches run across the passes."""
    rest = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(rest) < batch_size:
            rest = np.concatenate([rest, np.random.default_rng([seed, epoch]).permutation(num_items)])
            epoch += 1
        yield rest[:batch_size]
        rest = rest[batch_size:]


def windowed_shuffle(num_items: int, seed: int, window: float = 0.5) -> Iterator[int]:
    """The endless order of EDM and IMM: a shuffled ring that keeps swapping each item just visited with one of the
    `window * num_items` before it (Karras et al. 2022, the released training loop)."""
    rng = np.random.RandomState(seed % (1 << 32))  # takes 32 bits
    order = np.arange(num_items)
    rng.shuffle(order)
    reach = int(np.rint(num_items * window))
    idx = 0
    while True:
        position = idx % num_items
        yield int(order[position])
        if reach >= 2:
            other = (position - rng.randint(reach)) % num_items
            order[position], order[other] = order[other], order[position]
        idx += 1


def batched(order: Iterator[int], batch_size: int) -> Iterator[np.ndarray]:
    """int64 [batch_size] batches of an endless order."""
    while True:
        yield np.fromiter((next(order) for _ in range(batch_size)), dtype=np.int64, count=batch_size)
