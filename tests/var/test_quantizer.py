"""The token pyramid: which convolution serves which scale, and what encoding and decoding promise."""

import pytest
import torch
from var.tiny import tiny_vae

from neon_run.check.numbers import fill
from neon_var.quantizer import MultiScaleQuantizer, phi_index


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (3, 4, [0, 2, 3]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 2, 2, 3]),
        (4, 3, [0, 0, 1, 2]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_scales_half_way_between_two_convolutions_take_the_one_float64_picks(num_scales, num_phi, expected):
    assert [phi_index(i, num_scales, num_phi) for i in range(num_scales)] == expected


def test_unshared_convolutions_are_used_one_per_scale():
    assert all(phi_index(i, S, S) == i for S in range(2, 33) for i in range(S))


@torch.no_grad()
def test_f_hat_is_the_sum_of_the_scales_contributions():
    quantizer = fill(MultiScaleQuantizer(32, 4, v_patch_nums=(1, 2, 4)))
    f = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scales = list(quantizer.scales(f))
    *_, f_hat = quantizer.accumulate([quantizer.maps(tokens) for tokens, _ in scales])
    torch.testing.assert_close(f_hat, scales[-1][1])


@torch.no_grad()
def test_tokens_of_fewer_scales_are_the_head_of_all_tokens():
    vae = tiny_vae()
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    every = vae.encode(images)
    for n in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(vae.encode(images, num_scales=n), every[:n], strict=True))


@torch.no_grad()
def test_teacher_input_of_one_scale_is_empty_and_of_all_scales_covers_the_rest():
    vae = tiny_vae()
    tokens = [torch.zeros(2, n, dtype=torch.int64) for n in (1, 4, 9)]
    assert vae.quantize.teacher_input(tokens[:1]).shape == (2, 0, 8)
    assert vae.quantize.teacher_input(tokens).shape == (2, 13, 8)
    torch.testing.assert_close(vae.tokens_to_input(torch.cat(tokens, dim=1)), vae.quantize.teacher_input(tokens))


def test_a_last_scale_of_another_size_than_the_features_is_refused():
    with pytest.raises(ValueError, match="last scale"):
        next(MultiScaleQuantizer(8, 4, v_patch_nums=(1, 2)).scales(torch.zeros(1, 4, 3, 3)))


def test_the_frozen_tokenizer_neither_trains_nor_drops():
    vae = tiny_vae()
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
