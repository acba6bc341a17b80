"""Sampling: the same tokens as the plain path, images that depend on nothing but their seed and label."""

import pytest
import torch
from var.reference_path import sample_tokens
from var.tiny import PATCH_NUMS, VAR_KWARGS, tiny_backbone, tiny_vae, tiny_var

from neon_core.seeds import PerImageRandom
from neon_files.errors import UserError
from neon_var.sampler import BatchNoise, PerImageNoise, filter_logits, sample_scales, to_uint8

SETTINGS = {"cfg": 2.0, "top_k": 30, "top_p": 0.9}


@torch.no_grad()
def tokens_of(net, labels, noise, **settings):
    return torch.cat([r.tokens for r in sample_scales(net, tiny_vae().quantize, labels, noise, **settings)], dim=1)


@pytest.mark.parametrize("changes", [{}, {"shared_aln": True}, {"attn_l2_norm": False}])
def test_the_fast_path_draws_the_tokens_of_the_plain_one(changes):
    net, vae, labels = tiny_var(**changes), tiny_vae(), torch.arange(6)
    ours = tokens_of(net, labels, PerImageNoise(PerImageRandom(range(6))), **SETTINGS)
    noise = PerImageNoise(PerImageRandom(range(6)))
    shape = (PATCH_NUMS, VAR_KWARGS["num_heads"], VAR_KWARGS["depth"])
    plain, _ = sample_tokens(net.state_dict(), vae.state_dict(), *shape, labels, noise.draw, **SETTINGS)
    assert torch.equal(ours, plain)


def test_an_image_does_not_depend_on_its_neighbours_or_place():
    net = tiny_var()
    whole = tokens_of(net, torch.arange(6), PerImageNoise(PerImageRandom([7, 8, 9, 10, 11, 12])), **SETTINGS)
    part = tokens_of(net, torch.tensor([4, 1]), PerImageNoise(PerImageRandom([11, 8])), **SETTINGS)
    assert torch.equal(part, whole[[4, 1]])
    backbone = tiny_backbone()
    images = backbone.sample([3, 4, 5], torch.tensor([1, 2, 3]), **SETTINGS)
    alone = backbone.sample([4], torch.tensor([2]), **SETTINGS)
    assert (images[1].int() - alone[0].int()).abs().max() <= 1  # batch size may move a value across a level


def test_other_seeds_and_other_labels_give_other_images():
    backbone = tiny_backbone()
    a, b, c = (backbone.sample([s], torch.tensor([k]), **SETTINGS) for s, k in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, backbone.sample([0], torch.tensor([0]), **SETTINGS))


def test_tokens_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(4000, 1, 4)
    drawn = PerImageNoise(PerImageRandom(range(4000))).draw(probabilities).flatten()
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - torch.tensor([0.5, 0.3, 0.2, 0.0])).abs().max() < 0.03 and share[3] == 0


def test_official_seeds_are_one_generator_for_the_batch():
    backbone = tiny_backbone()
    labels = torch.tensor([1, 2])
    images = backbone.sample([40, 41], labels, **SETTINGS, official_seeds=True)
    generator = torch.Generator().manual_seed(40)
    tokens = tokens_of(backbone.net, labels, BatchNoise(generator), **SETTINGS)
    decoded = backbone.vae.decode_tokens(torch.split(tokens, [1, 4, 9], dim=1))[-1]
    assert torch.equal(images, to_uint8((decoded + 1) * 0.5))


def test_the_shortcut_of_top_k_and_top_p_together_equals_one_after_the_other():
    logits = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    logits[0, 0, :40] = 1.0  # a tie across the k-th place: all of it survives top_k
    for k, p in ((10, 0.9), (64, 0.5), (1, 0.3), (20, 1e-9), (30, 1.0)):
        short, long = filter_logits(logits, k, p), filter_logits(filter_logits(logits, k), 0, p)
        assert torch.equal(short.isfinite().sum(-1), long.isfinite().sum(-1))
        assert torch.equal(short.flatten(0, 1)[1:], long.flatten(0, 1)[1:])  # which of the tied go is the sort's matter


def test_more_smooth_makes_soft_codes_of_every_precision():
    backbone = tiny_backbone()
    hard = backbone.sample([0, 1], torch.tensor([1, 2]), **SETTINGS)
    soft = backbone.sample([0, 1], torch.tensor([1, 2]), **SETTINGS, more_smooth=True)
    assert soft.shape == hard.shape and not torch.equal(soft, hard)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_sampling_gives_images(precision):
    images = tiny_backbone().sample([0, 1], torch.tensor([1, -1]), **SETTINGS, precision=precision)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 48, 48) and images.float().std() > 1


def test_decoding_in_parts_changes_nothing_but_rounding():
    backbone = tiny_backbone()
    whole, parts = (backbone.sample([0, 1, 2], None, **SETTINGS, decode_batch=n) for n in (None, 2))
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_truncation_is_half_a_level_darker_than_rounding():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    difference = to_uint8(x, "nearest").float() - to_uint8(x, "truncate").float()
    assert 0.4 < difference.mean() < 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 65}, "the vocabulary has 64 tokens"),
        ({"top_p": 1.5}, "--top_p"),
        ({"cfg": float("nan")}, "--cfg"),
        ({"precision": "fp8"}, "--precision"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": float("inf")}, "--temperature inf"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tiny_backbone().sample([0], None, **settings)


def test_temperature_divides_the_logits_before_the_filters_and_1_changes_nothing():
    net, vae, labels = tiny_var(), tiny_vae(), torch.arange(4)

    def scales(**settings):
        noise = PerImageNoise(PerImageRandom(range(4)))
        with torch.no_grad():
            return list(sample_scales(net, vae.quantize, labels, noise, cfg=2.0, top_p=0.9, **settings))

    first, at_1, at_2 = scales()[0], scales(temperature=1.0)[0], scales(temperature=2.0)[0]
    assert torch.equal(first.filtered_logits, at_1.filtered_logits) and torch.equal(first.tokens, at_1.tokens)
    assert torch.equal(at_2.filtered_logits, filter_logits(first.guided_logits / 2, top_p=0.9))
    cold = torch.cat([scale.tokens for scale in scales(temperature=1e-3)], dim=1)
    noise = PerImageNoise(PerImageRandom(range(50, 54)))
    assert torch.equal(cold, tokens_of(net, labels, noise, cfg=2.0, top_k=1))  # the most probable, whatever the noise
