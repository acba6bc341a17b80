"""A row on Fashion-MNIST in miniature: made-up images in place of the data set, and trainings of two steps."""

import dataclasses
from pathlib import Path

import pytest
import torch

from neon_run import stages
from neon_run.fashion import prepare
from neon_run.fashion.data import Fashion
from neon_run.row import Row

CPU = torch.device("cpu")


def stripes(count: int) -> torch.Tensor:
    """uint8 [count, 1, 16, 16]: ten classes of different stripes, each image of another brightness."""
    x, level = torch.arange(16), torch.linspace(0.5, 1, count)
    rows = [127 * (1 + torch.sin(x * (1 + k % 10) / 5)) * level[k] for k in range(count)]
    return torch.stack([row.expand(16, 16) for row in rows])[:, None].to(torch.uint8)


def in_miniature(row: Row, folder: Path) -> tuple[stages.Model, dict[str, Path]]:
    """(the prepared base with a row whose S and fine-tune are small, all files that were prepared)."""
    images, labels = stripes(120), torch.arange(120) % 10
    short = {"images": 32, "batch_size": 16, "micro_batch_size": 8}
    small = dataclasses.replace(
        row,
        prepare=dataclasses.replace(row.prepare, base=dataclasses.replace(row.prepare.base, **short), feature_steps=20),
        train=dataclasses.replace(row.train, **short),
        num_synthetic=20,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_fashion", lambda data: Fashion(images, labels, images[:80], labels[:80]))
        patch.setattr(prepare, "LEAST_ACCURACY", 0.0)
        files = small.prepare(small, folder, 0)
    return stages.Model(small, files["base"], CPU), files
