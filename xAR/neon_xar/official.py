"""What the official scripts compute where ours go another way: the evaluation's label list, the epoch-wise schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neon_files.errors import UserError


def official_labels(num_images: int, class_num: int, batch_size: int = 1, world_size: int = 1) -> Tensor:
    """int64 labels of the official evaluation: num_images // class_num of each class in order, then class 0 up to the
    next multiple of batch_size * world_size. So a remainder of num_images is missing, or counts as class 0.

    Raises UserError where there are fewer images than classes.
    """
    each = num_images // class_num
    if each == 0:
        raise UserError(f"--num_images {num_images}: the official label list needs at least {class_num}, one per class")
    labels = torch.arange(class_num).repeat_interleave(each)
    whole = math.ceil(len(labels) / (batch_size * world_size)) * batch_size * world_size
    return torch.cat([labels, torch.zeros(whole - len(labels), dtype=torch.int64)])


def official_lr(lr: float, min_lr: float, warmup_epochs: float, epoch: float) -> float:
    """Linear from 0, then `lr` up to epoch 600, then a cosine to `min_lr` at 800 that nothing stops from rising again.

    The published runs end inside the warm-up, which makes it a plain linear ramp.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch < 600:
        return lr
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - 600) / 200))


@dataclass(frozen=True)
class OfficialSchedule:
    """`official_lr` over images seen, as a factor of the peak."""

    warmup_epochs: float
    epoch_images: int  # what one epoch counts: steps per epoch * batch size, an incomplete last batch dropped
    min_factor: float = 0.0  # min_lr / lr

    def __call__(self, images_seen: int) -> float:
        return official_lr(1.0, self.min_factor, self.warmup_epochs, images_seen / self.epoch_images)
