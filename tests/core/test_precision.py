"""The precision of float32 on a GPU is a setting with an end."""

import pytest
import torch

from neon_core.precision import float32_precision


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
