"""The real images: scikit-learn's bundled copy of the UCI handwritten digits, 1797 of 8 x 8 pixels and 17 grey levels.

Grey level v = 0 .. 16 is stored as uint8 round(255 v / 16), so that the digits are ordinary images with the full range
[0, 255] and go through the same files and functions as any others. The 17 values are distinct and `grey_levels` gets v
back exactly; the network sees x = v / 8 - 1 in [-1, 1], not the rounded uint8 / 127.5 - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neon_files.errors import UserError

NUM_LEVELS = 17
NUM_TRAIN = 1197
NUM_CLASSES = 10
IMG_SIZE = 8


@dataclass(frozen=True)
class Digits:
    """One split. Images uint8 [N, 1, 8, 8], labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    heldout_images: Tensor  # for the report only: nothing is trained or selected on them
    heldout_labels: Tensor


def load_digits_split(seed: int) -> Digits:
    """1197 training and 600 held-out digits, dealt by `seed`. Raises UserError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, which is missing; pip install scikit-learn") from error
    levels, labels = load_digits(return_X_y=True)  # [1797, 64], [1797]
    images = levels_to_uint8(torch.from_numpy(levels).view(-1, 1, IMG_SIZE, IMG_SIZE))
    labels = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(labels)))
    train, heldout = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(images[train], labels[train], images[heldout], labels[heldout])


def levels_to_uint8(levels: Tensor) -> Tensor:
    """Whole grey levels 0 .. 16 -> uint8 0 .. 255."""
    return (levels * (255 / (NUM_LEVELS - 1))).round().to(torch.uint8)


def grey_levels(images: Tensor) -> Tensor:
    """uint8 0 .. 255 -> the nearest of the grey levels 0 .. 16, float32. Undoes `levels_to_uint8` exactly."""
    return (images.float() * ((NUM_LEVELS - 1) / 255)).round()


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 -> float32 v / 8 - 1 in [-1, 1], for networks and pixel distances."""
    return grey_levels(images) / 8 - 1
