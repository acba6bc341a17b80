"""The precision of float32 on a GPU is a setting with an end."""

import pytest
import torch

from neon_core.precision import float32_precision, product_layers, weights_as


def test_precision_flags_are_set_inside_and_restored_after():
    conv, product = torch.backends.cudnn, torch.backends.cuda.matmul
    conv, name = (conv.conv, "fp32_precision") if hasattr(conv, "conv") else (conv, "allow_tf32")
    before = getattr(conv, name), getattr(product, name)
    seen = []
    for places in ("none", "conv", "all"):
        with float32_precision(places):
            seen.append((getattr(conv, name) in ("tf32", True), getattr(product, name) in ("tf32", True)))
    assert seen == [(False, False), (True, False), (True, True)]
    with pytest.raises(RuntimeError, match="inside"), float32_precision("all"):
        raise RuntimeError("inside")
    assert (getattr(conv, name), getattr(product, name)) == before


def test_weights_are_held_in_half_precision_inside_and_are_the_same_tensors_after():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    before = [(p, p.data_ptr(), p.clone()) for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), weights_as(torch.bfloat16, product_layers(net)):
        assert [p.dtype for p in net[0].parameters()] == [torch.bfloat16] * 2 and net[1].weight.dtype == torch.float32
        raise RuntimeError("inside")
    for now, (old, place, value) in zip(net.parameters(), before, strict=True):
        assert now is old and now.data_ptr() == place and torch.equal(now, value)
    with weights_as(None, product_layers(net)):
        assert net[0].weight.dtype == torch.float32
