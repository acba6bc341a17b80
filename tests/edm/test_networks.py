"""What the golden cases leave open: memory layout, gradients, refusals."""

import pytest
import torch
from edm.conftest import PICO, pico_net

from neon_edm.layers import Conv2d, GroupNorm, self_attention
from neon_edm.networks import SongUNet
from neon_edm.precond import build_network, iddpm_table, named_arguments


def test_channels_last_gives_the_same_image():
    net = pico_net().eval()
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(4)[:2]
    with torch.no_grad():
        expected = net(x, sigma, labels)
        net.to(memory_format=torch.channels_last)
        assert torch.allclose(net(x.contiguous(memory_format=torch.channels_last), sigma, labels), expected, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_softmax_of_scaled_products(heads):
    qkv = torch.randn(2, 3 * 16, 3, 5, dtype=torch.float64)
    by_hand = qkv.reshape(2 * heads, 16 // heads, 3, 15).unbind(2)
    q, k, v = by_hand
    weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / (16 // heads) ** 0.5, dim=2)
    expected = torch.einsum("nqk,nck->ncq", weights, v).reshape(2, 16, 3, 5)
    assert torch.allclose(self_attention(qkv, heads), expected)


def test_every_parameter_but_the_biases_of_keys_gets_a_gradient():
    net = pico_net(dropout=0.0).train()
    x = torch.randn(2, 3, 8, 8)
    net(x, torch.tensor([0.3, 2.0]), torch.eye(4)[:2], augment_labels=torch.randn(2, 9)).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_labels_are_dropped_in_training_only():
    net = pico_net(label_dropout=1.0 - 1e-9)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor(1.0), torch.eye(4)[:2]
    with torch.no_grad():
        assert not torch.equal(net.eval()(x, sigma, labels), net(x, sigma))
        for block in net.modules():
            if hasattr(block, "skip_scale"):
                block.dropout = 0.0
        assert torch.allclose(net.train()(x, sigma, labels), net(x, sigma), atol=1e-6)


def test_a_low_pass_filter_keeps_constant_images_constant():
    for up, size in ((True, 16), (False, 4)):
        layer = Conv2d(3, 3, kernel=0, up=up, down=not up, resample_filter=[1, 3, 3, 1])
        y = layer(torch.ones(1, 3, 8, 8))
        assert y.shape == (1, 3, size, size)
        assert torch.allclose(y[:, :, 2:-2, 2:-2], torch.ones(1))


def test_groups_are_at_least_four_channels_wide():
    assert [GroupNorm(c).num_groups for c in (8, 16, 128, 256)] == [2, 4, 32, 32]


@pytest.mark.parametrize("wrong", [{"embedding_type": "sine"}, {"encoder_type": "none"}, {"decoder_type": "residual"}])
def test_unknown_types_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SongUNet(8, 3, 3, model_channels=8, **wrong)


def test_constructor_arguments_by_position_get_their_names():
    named = named_arguments("VEPrecond", [8, 3, 4, False, 0.01], {"model_channels": 8})
    assert list(named) == ["img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "model_channels"]
    assert list(named.values()) == [8, 3, 4, False, 0.01, 8]
    with pytest.raises(ValueError, match="Other is not one of"):
        named_arguments("Other", [], {})


def test_tables_are_real_also_where_weights_are_not():
    """Networks are built on the meta device before their weights are read; noise ranges must not depend on that."""
    for name in ("VPPrecond", "iDDPMPrecond"):
        with torch.device("meta"):
            empty = build_network(name, PICO)
        full = build_network(name, PICO)
        assert (empty.sigma_min, empty.sigma_max) == (full.sigma_min, full.sigma_max)


def test_rounding_keeps_dtype_and_shape_and_lands_on_the_table():
    net = pico_net(class_name="iDDPMPrecond", M=20)
    sigma = torch.tensor([[0.1, 5.0], [80.0, 1e9]], dtype=torch.float64)
    rounded = net.round_sigma(sigma)
    assert rounded.dtype == torch.float64 and rounded.shape == (2, 2)
    assert all(value in iddpm_table(20, 0.001, 0.008).astype("float64") for value in rounded.flatten().tolist())
    assert net.round_sigma(3.0).shape == ()
