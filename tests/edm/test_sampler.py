"""Algorithm 2: how many calls, which noise, and what an image depends on."""

import pytest
import torch

from neon_core.seeds import PerImageRandom
from neon_edm.sampler import edm_sampler, time_steps, to_uint8
from neon_files.errors import UserError


class Gauss:
    """The exact denoiser of unit normal data."""

    sigma_min, sigma_max = 0.0, float("inf")
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, class_labels):
        self.calls += 1
        return x / (1 + sigma**2)


@pytest.mark.parametrize("num_steps", [-1, 0, 1])
def test_fewer_than_two_steps_are_refused(num_steps):
    with pytest.raises(UserError, match="num_steps"):
        edm_sampler(Gauss(), torch.zeros(1, 1, 2, 2), num_steps=num_steps)


def test_network_calls_are_two_per_step_but_one():
    net = Gauss()
    edm_sampler(net, torch.randn(2, 1, 4, 4), num_steps=7)
    assert net.calls == 13


def test_without_churn_no_noise_is_drawn():
    edm_sampler(Gauss(), torch.randn(1, 1, 2, 2), noise=None, num_steps=3, S_churn=0)


def test_with_churn_noise_is_drawn_in_every_step_also_outside_the_range():
    drawn = []

    def noise():
        drawn.append(1)
        return torch.zeros(1, 1, 2, 2, dtype=torch.float64)

    latents = torch.randn(1, 1, 2, 2)
    outside = edm_sampler(Gauss(), latents, noise=noise, num_steps=5, S_churn=10, S_min=1e3, S_max=1e4)
    assert len(drawn) == 5
    assert torch.equal(outside, edm_sampler(Gauss(), latents, num_steps=5))


def test_the_sampler_of_the_exact_denoiser_gives_the_data_back():
    """Both samplers end at unit variance, the stochastic one through its own noise."""
    torch.manual_seed(0)
    latents = torch.randn(1, 1, 200, 200)
    noise = lambda: torch.randn(1, 1, 200, 200, dtype=torch.float64)  # noqa: E731
    for settings in ({}, {"S_churn": 10}):
        x = edm_sampler(Gauss(), latents, noise=noise, num_steps=40, **settings)
        assert x.dtype == torch.float64
        assert abs(float(x.std()) - 1) < 0.02


def test_steps_stay_within_what_the_network_knows():
    net = Gauss()
    net.sigma_min, net.sigma_max = 0.5, 3.0
    t = time_steps(net, 5)
    assert float(t[0]) == pytest.approx(3.0) and float(t[-2]) == pytest.approx(0.5) and t[-1] == 0


def test_pixels_are_truncated_not_rounded():
    x = torch.tensor([-1.0, 0.0, 0.999 / 127.5, 1 / 127.5, 1.0, 9.0, -9.0], dtype=torch.float64)
    assert to_uint8(x).tolist() == [0, 128, 128, 129, 255, 255, 0]


@pytest.mark.parametrize("settings", [{}, {"S_churn": 2.0}])
def test_an_image_is_a_function_of_its_seed_not_of_its_batch(backbone, settings):
    seeds = [3, 70, 4294967297, 12]
    labels = backbone.assign_labels(seeds)
    together = backbone.sample(seeds, labels, num_steps=3, **settings)
    for i, seed in enumerate(seeds):
        alone = backbone.sample([seed], labels[i : i + 1], num_steps=3, **settings)[0]
        assert (alone.int() - together[i].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_noise_of_the_steps_is_drawn_after_the_class(backbone):
    """As the official calculate_fid.py: latents, class, then noise; with --class the class is not drawn."""
    random = PerImageRandom([5])
    latents = random.randn(3, 8, 8)
    drawn = random.randint(4)
    labels = backbone.assign_labels([5])
    assert torch.equal(labels, drawn)
    noise = lambda: random.randn(3, 8, 8, dtype=torch.float64)  # noqa: E731
    with torch.inference_mode():
        x = edm_sampler(backbone.net, latents, backbone.one_hot(labels), noise, num_steps=3, S_churn=3.0)
    assert torch.equal(to_uint8(x), backbone.sample([5], labels, num_steps=3, S_churn=3.0))
    fixed = backbone.sample([5], labels, num_steps=3, S_churn=3.0, class_idx=int(labels[0]))
    assert not torch.equal(fixed, to_uint8(x))
