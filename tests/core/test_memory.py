"""A batch that will not fit a GPU is known before anything is sampled, with the batch that fits."""

import json

import pytest
import torch
from torch import nn

from neon_run import memory
from neon_run.replay import Recorded

GPU = torch.device("cuda", 0)


class Network:
    """A backbone of 12 parameters in half precision, as in the table below."""

    net = nn.Linear(3, 3)

    def precisions(self, precision="auto", **settings):
        return {"network": "fp32" if precision == "fp32" else "fp16"}


@pytest.fixture
def warned(tmp_path, monkeypatch, capsys):
    """warned(free GiB, batch, precision) -> the line."""
    table = tmp_path / "memory.json"
    entry = {"network": "a/row", "half": [[4.0, 0.5], [5.0, 0.1]], "fp32": [[4.0, 0.5]], "measured": {"fp32": [4, 1]}}
    table.write_text(json.dumps({"12": entry}), encoding="utf-8")
    monkeypatch.setattr(memory, "SAMPLING_MEMORY", table)

    def run(free, batch, precision="auto", device=GPU):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free - 3) * 2**30, 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)  # by the weights
        memory.warn_of_large_batch(Network(), {"precision": precision}, batch, device)
        return capsys.readouterr().err

    return run


def test_a_batch_that_fits_is_not_spoken_of(warned):
    assert warned(15, 20) == "" and warned(6.15, 1) == "" and warned(25, 20, "fp32") == ""


def test_one_line_names_the_batch_that_fits(warned):
    line = "warning: a batch of 21 needs about 15.5 GiB, and cuda:0 has 15.0 free; --batch_size 20 fits\n"
    assert warned(15, 21) == line
    assert "needs about 6.1 GiB" in warned(6.05, 1)  # a decoder's parts hold more than the network does
    assert "--batch_size 10 fits" in warned(15, 20, "fp32")


def test_recorded_calls_take_more(warned, monkeypatch):
    monkeypatch.setattr(Network.net, "calls", Recorded(Network.net), raising=False)
    assert "a batch of 20 needs about 26.9 GiB" in warned(15, 20) and "--batch_size 7 fits" in warned(15, 20)
    assert warned(15, 7) == ""
    assert "no batch fits; leave --compile out" in warned(6, 8)


def test_where_no_image_fits_that_is_said(warned):
    assert warned(4.5, 8).endswith("no batch fits; use a larger GPU\n")  # in half precision already
    assert warned(4.5, 8, "fp32").endswith("no batch fits; use a larger GPU, or --precision fp16\n")


def test_cpus_and_unknown_networks_pass_in_silence(warned, monkeypatch):
    assert warned(1, 64, device=torch.device("cpu")) == ""
    monkeypatch.setattr(Network, "net", nn.Linear(4, 4))
    assert warned(1, 64) == ""
