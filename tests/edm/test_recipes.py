"""The three rows say what the official run scripts do."""

import pytest

from neon_core.selftrain import snapshot_plan
from neon_edm import official
from neon_edm.recipes import RECIPES, w_grid

CIFAR10_SNAPSHOTS = [50, 551, 1053, 1555, 2057, 2558, 3060, 3562, 4064, 4566, 5067, 5569, 6000]
FFHQ_SNAPSHOTS = [50, 301, 551, 802, 1053, 1304, 1555, 1806, 2057, 2308, 2558, 2809, 3000]


@pytest.mark.parametrize(
    ("name", "kimg", "lr_at_end", "beta"),
    [
        ("cifar10_cond", CIFAR10_SNAPSHOTS, 6.0e-5, 0.99929),
        ("cifar10_uncond", CIFAR10_SNAPSHOTS, 6.0e-5, 0.99929),
        ("ffhq64", FFHQ_SNAPSHOTS, 1.2e-6, 0.99965),
    ],
)
def test_snapshots_learning_rate_and_average_are_the_official_ones(name, kimg, lr_at_end, beta):
    train = RECIPES[name].train
    plan = snapshot_plan(train)
    assert [n // 1000 for n in plan] == kimg
    assert all(n % train.batch_size == 0 for n in plan)
    assert train.lr * train.schedule(0) == 0, "the ramp starts from 0, also for a trained network"
    assert train.lr * train.schedule(plan[-1]) == pytest.approx(lr_at_end, rel=1e-3)
    assert train.ema.beta(plan[-1], train.batch_size) == pytest.approx(beta, abs=5e-6)
    assert train.nonfinite_gradients == "zero" and train.precision == "fp32"


def test_settings_that_are_given_replace_those_of_the_row():
    row = RECIPES["ffhq64"]
    assert row.with_settings() == row
    changed = row.with_settings(batch_size=8, images=12_000, tick_images=1000, snapshot_ticks=5, augment=0.0)
    assert changed.train.micro_batch_size == 8 and changed.augment == 0.0 and changed.dropout == 0.05
    assert [n // 1000 for n in snapshot_plan(changed.train)] == [1, 6, 11, 12]
    assert changed.train.lr == row.train.lr


@pytest.mark.parametrize(("millions", "images"), [(6, 6_000_000), (0.0127, 12_000), (0.0001, 1000), (5.569, 5_569_000)])
def test_lengths_in_millions_are_truncated_to_thousands(millions, images):
    assert official.duration_images(millions) == images


def test_the_search_is_the_official_one():
    assert w_grid("cifar10_cond") == w_grid(None) and w_grid(None)[-1] == 2.0 and len(w_grid(None)) == 9
    assert w_grid("ffhq64")[-1] == 3.0 and len(w_grid("ffhq64")) == 13
