"""The augmentation: what leaves images alone, what is exact, what is refused."""

import pytest
import torch

from neon_edm import augment
from neon_edm.augment import AugmentPipe, mirrored
from neon_edm.backbone import augmentation
from neon_edm.loss import GeneratorRandom


def random(seed: int = 0) -> GeneratorRandom:
    return GeneratorRandom(torch.Generator().manual_seed(seed), torch.device("cpu"))


def smooth_images(n: int = 4, size: int = 16) -> torch.Tensor:
    grid = torch.linspace(-1, 1, size)
    return torch.stack([torch.sin((k + 1) * grid)[:, None] * torch.cos(k * grid) for k in range(n)])[:, None].repeat(
        1, 3, 1, 1
    )


def test_closed_gates_leave_images_and_labels_alone():
    images = smooth_images()
    out, labels = AugmentPipe(p=0, xflip=1, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1, hue=1)(
        images, random()
    )
    assert labels.shape == (4, 11) and not labels.any()
    assert torch.allclose(out, images, atol=1e-2), "two passes of the low-pass filter are all that is left"


def test_without_stages_nothing_is_drawn_or_labelled():
    images = smooth_images()
    out, labels = AugmentPipe()(images, None)
    assert out is images and labels.shape == (4, 0)


def test_mirrors_are_certain_at_any_p_and_exact():
    images = torch.randn(64, 3, 8, 8)
    out, labels = AugmentPipe(p=1e-3, xflip=1e8)(images, random())
    flipped = labels[:, 0] == 1
    assert 16 < int(flipped.sum()) < 48
    assert torch.equal(out[flipped], images[flipped].flip(3)) and torch.equal(out[~flipped], images[~flipped])


def test_the_official_settings_give_nine_labels_and_depend_on_the_generator_alone():
    images = smooth_images()
    a, labels = augmentation(0.9)(images, random(1))
    b, same = augmentation(0.9)(images, random(1))
    assert labels.shape == (4, 9) and labels.dtype == torch.float32
    assert torch.equal(a, b) and torch.equal(labels, same)
    assert not torch.equal(augmentation(0.9)(images, random(2))[1], labels)


def test_a_half_turn_by_resampling_is_the_half_turn_by_copying():
    """rotate_frac with w = pi: everything from the margins to the grid must be centred (the symlet is not quite)."""

    class HalfTurn(GeneratorRandom):
        def rand(self, shape):
            return torch.ones(shape)  # u = 1: w = pi; the gate is opened by its multiplier

    images = smooth_images()
    out, labels = AugmentPipe(rotate_frac=1e8)(images, HalfTurn(torch.Generator(), torch.device("cpu")))
    assert torch.allclose(labels[:, 0], torch.tensor(-2.0))
    assert torch.allclose(out[:, :, 2:-2, 2:-2], images.flip(2, 3)[:, :, 2:-2, 2:-2], atol=0.08)


def test_reflection_does_not_repeat_the_edge():
    assert mirrored(torch.arange(-4, 8), 4).tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert mirrored(torch.tensor([-3, 5]), 1).tolist() == [0, 0]


def test_colours_need_one_or_three_channels_and_quarter_turns_a_square():
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        AugmentPipe(brightness=1)(torch.zeros(1, 2, 4, 4), random())
    with pytest.raises(ValueError, match="square"):
        AugmentPipe(rotate_int=1)(torch.zeros(1, 3, 4, 6), random())
    out, _ = AugmentPipe(scale=1)(torch.zeros(1, 2, 4, 4), random())
    assert out.shape == (1, 2, 4, 4)


def test_the_widest_margins_of_a_gpu_give_the_same_images(monkeypatch):
    """Where the host does not wait to learn how far the batch reaches, it pads by all that reflection can give."""
    pipe = AugmentPipe(p=0.9, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    exact, _ = pipe(smooth_images(), random())
    monkeypatch.setattr(augment, "margins", lambda M, height, width: (width - 1, height - 1, width - 1, height - 1))
    assert torch.allclose(pipe(smooth_images(), random())[0], exact, atol=1e-4)
