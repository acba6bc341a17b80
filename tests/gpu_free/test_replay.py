"""Recorded calls: the images of every backbone's sampler are those of the calls as they come.

Where there is no GPU, a stand-in does on the CPU what a CUDA graph does: it fixes the addresses that a call reads and
writes, and each replay overwrites the output of the one before.
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neon_core.kl_vae import AutoencoderKL
from neon_edm import check as edm
from neon_edm.backbone import EDMBackbone
from neon_edm.precond import build_network
from neon_files.errors import UserError
from neon_imm import check as imm
from neon_imm.backbone import IMMBackbone
from neon_imm.latents import RgbCodec
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond
from neon_run import replay
from neon_run.check.numbers import fill
from neon_run.replay import Calls, Recorded
from neon_var import check as var
from neon_var.backbone import VARBackbone
from neon_var.var import VAR
from neon_var.vqvae import VQVAE
from neon_xar import check as xar
from neon_xar.backbone import XARBackbone
from neon_xar.xar import XAR

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StandIn:
    """`replay.Recording` on the CPU. What moved since would be read where it was: garbage."""

    made = 0

    def __init__(self, function, inputs, pool):
        StandIn.made += 1
        self.function, self.own = function, [None if x is None else x.clone() for x in inputs]
        self.output = function(*self.own)

    def __call__(self, inputs):
        for own, x in zip([x for x in self.own if x is not None], inputs, strict=True):
            own.copy_(x)
        for old, new in zip(tree_leaves(self.output), tree_leaves(self.function(*self.own)), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, self.output)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    StandIn.made = 0
    if DEVICE.type == "cpu":
        monkeypatch.setattr(replay, "Recording", StandIn)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)


def backbones() -> dict:
    """Name -> (backbone of tiny networks, settings of its sampler)."""
    unet = {"class": "EDMPrecond", "kwargs": edm.TINY}
    rgb = {"class": "IMMPrecond", "kwargs": {**imm.TINY, "img_channels": 3}}
    ready = lambda net: fill(net).eval().to(DEVICE)  # noqa: E731
    return {
        "edm": (EDMBackbone(fill(build_network(unet["class"], unet["kwargs"])), unet, DEVICE), {"num_steps": 4}),
        "imm": (
            IMMBackbone(ready(IMMPrecond(**rgb["kwargs"])), RgbCodec(3), IMMLoss(), rgb),
            {"num_steps": 3, "cfg": 1.5},
        ),
        "var": (
            VARBackbone(ready(VAR(**var.TINY)), ready(VQVAE(**var.TINY_TOKENIZER)), var.TINY),
            {"cfg": 2.0, "top_k": 40, "top_p": 0.9},
        ),
        "xar": (
            XARBackbone(ready(XAR(**xar.TINY)), ready(AutoencoderKL(**xar.TINY_AUTOENCODER))),
            {"cfg": 2.0, "flow_steps": 4},
        ),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["edm", "imm", "var", "xar"])
def test_images_of_full_and_smaller_batches_and_of_changed_weights_are_the_same(name, precision):
    """Five batches, then a merge in place; each batch is sampled in both ways."""
    backbone, settings = backbones()[name]
    settings["precision"] = precision
    plain = copy.deepcopy(backbone)
    backbone.net.requires_grad_(False).calls = Recorded(backbone.net)
    for change in (False, True):
        if change:
            for net in (plain.net, backbone.net):
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(1.25)
        for seeds in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10], [11, 12, 13]):
            labels = backbone.assign_labels(seeds)
            images, expected = (which.sample(seeds, labels, **settings) for which in (backbone, plain))
            assert expected.float().std() > 0
            assert torch.equal(images, expected), f"{name}, seeds {seeds}"
    kinds = {"edm": 1, "imm": 1, "var": 3, "xar": 7}[name]  # a step; scales; first and later steps of a cell
    assert len(backbone.net.calls._recordings) == 2 * kinds  # for both sizes of a batch


class Net(nn.Module):
    calls = Calls()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2).requires_grad_(False)


def recorded_net() -> Net:
    net = Net().eval().to(DEVICE)
    net.calls = Recorded(net)
    return net


@torch.no_grad()
def test_a_call_is_recorded_when_it_comes_again_and_each_kind_once():
    net, x = recorded_net(), torch.ones(3, 2, device=DEVICE)
    for count, size in ((0, 3), (1, 3), (1, 3), (1, 2), (2, 2), (2, 3)):
        net.calls.run("layer", net.layer, x[:size])
        assert len(net.calls._recordings) == count


@torch.no_grad()
def test_a_call_that_failed_is_not_recorded_when_it_comes_again():
    """It may have failed before it was compiled, and a recording cannot compile."""
    net, x = recorded_net(), torch.ones(1, 2, device=DEVICE)

    def fails(x):
        raise KeyError

    with pytest.raises(KeyError):
        net.calls.run("layer", fails, x)
    for count in (0, 1):
        net.calls.run("layer", net.layer, x)
        assert len(net.calls._recordings) == count


@torch.no_grad()
def test_results_stay_when_the_next_call_comes():
    net = recorded_net()
    results = [net.calls.run("twice", lambda x: {"y": 2 * x, "n": 2}, torch.full((2,), float(i), device=DEVICE))
               for i in range(4)]  # fmt: skip
    assert [result["y"][0].item() for result in results] == [0, 2, 4, 6] and results[-1]["n"] == 2


@torch.no_grad()
def test_weights_and_what_is_read_may_move_or_change_in_place():
    net, x, read = recorded_net(), torch.ones(1, 2, device=DEVICE), torch.zeros(2, device=DEVICE)

    def call():
        return net.calls.run("sum", lambda x, read=read: net.layer(x) + read, x, reads=[read])

    for _ in range(3):
        expected = net.layer(x)
        assert torch.equal(call(), expected)
    read += 1
    assert torch.equal(call(), expected + 1)
    net.layer.weight.data = net.layer.weight.data * 2  # elsewhere
    moved = net.layer(x)
    for _ in range(3):
        assert torch.equal(call(), moved + 1)
    other = torch.full((2,), 5.0, device=DEVICE)
    for _ in range(3):
        found = net.calls.run("sum", lambda x: net.layer(x) + other, x, reads=[other])
        assert torch.equal(found, moved + 5)


@torch.no_grad()
def test_kinds_differ_by_precision():
    net, x = recorded_net(), torch.ones(1, 2, device=DEVICE)
    for _ in range(3):
        exact = net.calls.run("layer", net.layer, x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            half = net.calls.run("layer", net.layer, x)
        assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)


def test_training_is_not_recorded_and_a_copy_of_the_network_records_nothing():
    net, x = recorded_net(), torch.ones(1, 2, device=DEVICE, requires_grad=True)
    for _ in range(3):
        net.calls.run("layer", net.layer, x).sum().backward()
    with torch.no_grad():
        net.train()
        for _ in range(3):
            net.calls.run("layer", net.layer, x)
    assert not net.calls._recordings
    assert type(copy.deepcopy(net).calls) is Calls


@torch.no_grad()
def test_what_is_held_and_stored_keeps_its_place():
    calls, like = recorded_net().calls, torch.ones(1, device=DEVICE)
    places = []
    for value in (1.0, 2.0):
        tree = {"a": torch.full((2,), value, device=DEVICE), "none": None, "n": 3}
        held = calls.hold("tree", tree, torch.bfloat16)
        assert held["none"] is None and held["n"] == 3 and held["a"].tolist() == [value] * 2
        places.append(held["a"].data_ptr())
    assert places[0] == places[1] and held["a"].dtype == torch.bfloat16
    first, smaller, larger = (calls.stores("k", [(rows, 4)] * 2, like, torch.float32) for rows in (3, 2, 5))
    assert [x.data_ptr() for x in smaller] == [x.data_ptr() for x in first] and smaller[1].shape == (2, 4)
    assert larger[0].shape == (5, 4)
    plain = Calls()
    assert plain.hold("tree", tree) is tree and plain.hold("x", [like], torch.float64)[0].dtype == torch.float64
    assert [x.shape for x in plain.stores("k", [(3, 4)], like, torch.float16)] == [(3, 4)]


@torch.no_grad()
def test_a_call_that_cannot_be_recorded_is_one_sentence(monkeypatch):
    monkeypatch.undo()  # the stand-in

    class Refused:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refused)
    monkeypatch.setattr(torch.cuda, "graph", Refused)
    with pytest.raises(UserError) as error:
        replay.Recording(partial(torch.add, 1), [torch.ones(1)], None)
    assert error.value.message == (
        "--compile: calls of this network cannot be recorded here (operation not permitted when stream is capturing); "
        "leave --compile out"
    )
