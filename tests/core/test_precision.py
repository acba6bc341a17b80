"""The precision of float32 on a GPU is a setting with an end."""

import pytest
import torch

from neon_core.precision import float32_precision


def test_precision_flags_are_set_inside_and_restored_after():
    backend = torch.backends.cudnn
    where, name = (backend.conv, "fp32_precision") if hasattr(backend, "conv") else (backend, "allow_tf32")
    before = getattr(where, name)
    seen = []
    for allow in (False, True):
        with float32_precision(allow):
            seen.append(getattr(where, name))
    assert seen in (["ieee", "tf32"], [False, True])
    with pytest.raises(RuntimeError, match="inside"), float32_precision(True):
        raise RuntimeError("inside")
    assert getattr(where, name) == before
