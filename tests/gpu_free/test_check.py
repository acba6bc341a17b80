"""`neon check` of a row at full size on a GPU that is not there."""

import functools
from dataclasses import replace

import pytest
import torch
from gpu_free.fake_cuda import GIB, GPU, built, fake_cuda
from gpu_free.published import ROWS

from neon_core.selftrain import FineTune
from neon_run.backbones import backbone_of
from neon_run.check import speed

CARD = {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": GIB}


@pytest.mark.parametrize("name", ["var/imagenet_256", "imm/imagenet_256"])
def test_the_check_of_a_machine_measures_a_row_on_a_gpu(name, monkeypatch):
    """At the row's batch and its micro batch, with the peak of the card's allocator."""
    row = ROWS[name].row
    if ROWS[name].steps:
        row = replace(row, evaluate={**row.evaluate, ROWS[name].steps: 3})
    for function, value in CARD.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    monkeypatch.setattr(speed, "RandomWeights", FakeWeights)
    monkeypatch.setattr(speed, "detector_rate", lambda device, side: 1000.0)
    with fake_cuda() as record:
        monkeypatch.setattr(speed, "FineTune", functools.partial(entered, record))
        measured = speed.measure(row, backbone_of(ROWS[name].row).machine_check, GPU, speed.Effort())
    assert "skipped" not in measured, measured
    assert measured["batch_size"] == row.batch_size and measured["training"]["images"] == row.train.micro_batch_size
    assert measured["launches"] > 1000 and measured["peak_bytes"] == measured["training"]["peak_bytes"] == GIB
    assert all(hours > 0 for hours in measured["hours"].values())


class FakeWeights:
    """Random weights have no numbers here."""

    bytes = 0

    def __init__(self, *_):
        pass

    def __call__(self, *args, **kwargs):
        return built(*args, **kwargs)


def entered(record, backbone, *args):
    """A fine-tune whose parameters autograd knows."""
    run = FineTune(backbone, *args)
    record.leaves(backbone.net.parameters())
    return run
