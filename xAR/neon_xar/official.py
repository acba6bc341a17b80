"""The official evaluation's label list, which differs from ours."""

from __future__ import annotations

import math

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
