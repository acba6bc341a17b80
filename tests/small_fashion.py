"""A row on Fashion-MNIST in miniature: made-up images in place of the data set, and trainings of two steps."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from neon_files.checkpoint import read_checkpoint
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


def check_labels_and_guidance(model: stages.Model, guidance: str, strong: float) -> None:
    """Classes go round; guidance changes images; an image does not depend on its batch."""
    backbone, seeds = model.load(), range(7, 19)
    with torch.no_grad():
        for parameter in backbone.net.parameters():  # a network that has hardly been trained heeds no label
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    labels = backbone.assign_labels(seeds, **model.row.evaluate)
    assert labels.tolist() == [seed % 10 for seed in seeds]
    plain, guided = ({**model.row.evaluate, guidance: value} for value in (1.0, strong))
    images = backbone.sample(seeds, labels, **plain)
    assert images.shape == (12, 1, 16, 16) and images.dtype == torch.uint8
    assert not torch.equal(images, backbone.sample(seeds, labels, **guided))
    half = backbone.sample(seeds[6:], labels[6:], **plain)
    assert (half.int() - images[6:].int()).abs().max() <= 1


def check_s_and_fine_tune(model: stages.Model, folder: Path) -> None:
    """S has as many images of every class; the fine-tune on it moves the weights, and not far."""
    stages.generate(model, folder / "S")
    entries = json.loads((folder / "S" / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert len(entries) == 20 and sorted(label for _, label in entries) == sorted(2 * list(range(10)))
    snapshots = stages.finetune(model, folder / "S", folder / "tuned")
    base, syn = read_checkpoint(model.checkpoint).state, read_checkpoint(snapshots[32]).state
    moved = torch.cat([(syn[name] - value).flatten() for name, value in base.items()]).norm()
    assert 0 < moved < 0.1
