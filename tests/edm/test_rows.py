"""The three rows say what the official run scripts do, and flags change them as the official ones would."""

import dataclasses

import pytest

from neon_core.selftrain import snapshot_plan
from neon_edm import official
from neon_edm.commands import COMMANDS
from neon_edm.rows import ANY_NETWORK, ROWS
from neon_files.errors import UserError
from neon_run.commands import common_training

CIFAR10_SNAPSHOTS = [50, 551, 1053, 1555, 2057, 2558, 3060, 3562, 4064, 4566, 5067, 5569, 6000]
FFHQ_SNAPSHOTS = [50, 301, 551, 802, 1053, 1304, 1555, 1806, 2057, 2308, 2558, 2809, 3000]
BY_NAME = {row.name: row for row in ROWS}


def trained_with(name: str, **flags):
    """The training settings of `finetune.py --preset name` with these flags."""
    row = BY_NAME[name]
    row = dataclasses.replace(row, train=common_training(row, {k: v for k, v in flags.items() if k in COMMON}))
    return COMMANDS.train_settings(row, flags)


COMMON = ("images", "batch_size", "micro_batch_size", "lr", "precision", "snapshot_images")


@pytest.mark.parametrize(
    ("name", "kimg", "lr_at_end", "beta"),
    [
        ("cifar10_cond", CIFAR10_SNAPSHOTS, 6.0e-5, 0.99929),
        ("cifar10_uncond", CIFAR10_SNAPSHOTS, 6.0e-5, 0.99929),
        ("ffhq64", FFHQ_SNAPSHOTS, 1.2e-6, 0.99965),
    ],
)
def test_snapshots_learning_rate_and_average_are_the_official_ones(name, kimg, lr_at_end, beta):
    train = BY_NAME[name].train
    plan = snapshot_plan(train)
    assert [n // 1000 for n in plan] == kimg
    assert all(n % train.batch_size == 0 for n in plan)
    assert train.lr * train.schedule(0) == 0, "the ramp starts from 0, also for a trained network"
    assert train.lr * train.schedule(plan[-1]) == pytest.approx(lr_at_end, rel=1e-3)
    assert train.ema.beta(plan[-1], train.batch_size) == pytest.approx(beta, abs=5e-6)
    assert train.nonfinite_gradients == "zero" and train.precision == "fp32"


@pytest.mark.parametrize("name", list(BY_NAME))
def test_without_flags_the_settings_are_the_rows(name):
    assert trained_with(name) == BY_NAME[name].train


def test_settings_that_are_given_replace_those_of_the_row():
    row = BY_NAME["ffhq64"]
    changed = trained_with("ffhq64", batch_size=8, duration=0.012, tick=1, snap=5, ema=0.25)
    assert changed.micro_batch_size == 8 and changed.lr == row.train.lr and changed.ema.halflife_images == 250_000
    assert [n // 1000 for n in snapshot_plan(changed)] == [1, 6, 11, 12]
    assert [n // 1000 for n in snapshot_plan(trained_with("ffhq64", batch_size=512))][:2] == [50, 301]
    assert snapshot_plan(trained_with("ffhq64", duration=0.512, snapshot_images=256_000)) == [256_000, 512_000]
    assert snapshot_plan(trained_with("digits_guided", images=12_800)) == [6400, 12_800]


def test_the_snapshots_are_said_once():
    with pytest.raises(UserError, match=r"--snapshot_images.*--tick"):
        trained_with("ffhq64", snapshot_images=1000, tick=1)


@pytest.mark.parametrize(("millions", "images"), [(6, 6_000_000), (0.0127, 12_000), (0.0001, 1000), (5.569, 5_569_000)])
def test_lengths_in_millions_are_truncated_to_thousands(millions, images):
    assert official.duration_images(millions) == images


def test_the_search_is_the_official_one():
    assert BY_NAME["cifar10_cond"].grid == ANY_NETWORK.grid
    assert ANY_NETWORK.grid.ws[-1] == 2.0 and len(ANY_NETWORK.grid.ws) == 9
    assert BY_NAME["ffhq64"].grid.ws[-1] == 3.0 and len(BY_NAME["ffhq64"].grid.ws) == 13
    for row in (*ROWS[:3], ANY_NETWORK):
        assert (row.grid.first_images, row.grid.last_images, row.grid.tolerance) == (51_000, 10_000_000, 0.03)


@pytest.mark.parametrize("row", [row for row in ROWS if row.base_fid])
def test_convolutions_sample_in_tf32_and_train_in_float32_as_in_the_official_scripts(row):
    assert (row.tf32, row.train_tf32, row.train.precision) == ("conv", "none", "fp32")
