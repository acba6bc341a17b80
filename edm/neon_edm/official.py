"""Rules of the official scripts: their merge, snapshots and lengths."""

from __future__ import annotations

from torch import Tensor

LR_RAMP_IMAGES = 10_000_000  # of every fine-tune, from a trained network too


def merge_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The official merge: (1 + w) base - w syn for everything."""
    return (1 + w) * base - w * syn


def snapshot_images(
    duration_images: int, batch_size: int, tick_images: int, snapshot_ticks: int
) -> tuple[list[int], int]:
    """The official training loop: (images seen at each snapshot, number of ticks).

    A tick ends at the first whole batch that reaches `tick_images` since the last tick ended, or at the end; ticks
    0, snapshot_ticks, 2 snapshot_ticks, ... and the last one leave a snapshot. The last batch may overshoot the end.
    """
    batches_per_tick = max(-(-tick_images // batch_size), 1)
    total = -(-duration_images // batch_size) * batch_size
    ends = [*range(batches_per_tick * batch_size, total, batches_per_tick * batch_size), total]
    kept = [end for tick, end in enumerate(ends) if tick % snapshot_ticks == 0 or end == total]
    return kept, len(ends)


def kimg(millions: float) -> int:
    """Images of a length that the official scripts take in millions: whole thousands, rounded towards 0."""
    return int(1000 * millions) * 1000


def duration_images(millions: float) -> int:
    """--duration of the official train.py: at least a thousand images."""
    return max(kimg(millions), 1000)
