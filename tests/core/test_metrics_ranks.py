"""Two gloo ranks, with even shares or one of them idle: the statistics of one process, on every rank."""

from pathlib import Path

import pytest
import torch
from core import metrics_ranks
from launch import launch

from neon_metrics import Reference
from neon_metrics.statistics import FeatureStatistics

SCRIPT = Path("tests/core/metrics_ranks.py")
RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks wrote; one launch for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(SCRIPT, folder, ranks=RANKS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("shares", ["even", "idle"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_ranks_together_hold_what_one_process_holds(folder, shares, rank):
    one = metrics_ranks.accumulate(list(range(metrics_ranks.NUM_IMAGES)))
    total = metrics_ranks.accumulate([])
    total.load_state_dict(torch.load(folder / f"{shares}-{rank}.pt", weights_only=True))
    ours, expected = total.feature_statistics, one.feature_statistics
    torch.testing.assert_close(ours.mean, expected.mean, rtol=1e-15, atol=0)
    torch.testing.assert_close(ours.covariance(), expected.covariance(), rtol=1e-12, atol=1e-12)
    assert torch.equal(total.features, one.features)  # gathered in the order of the images
    real = torch.randn(60, 9, generator=torch.Generator().manual_seed(2)) + 3000
    reference = Reference.from_statistics(FeatureStatistics(9).update(real))
    values = one.compute(reference, real)
    assert set(values) >= {"fid", "is_mean", "is_std", "kid_mean", "precision", "recall", "density", "coverage"}
    assert total.compute(reference, real) == pytest.approx(values, rel=1e-11)


def test_an_image_on_two_ranks_is_an_error_on_both(folder):
    messages = [(folder / f"error-{rank}.txt").read_text(encoding="utf-8") for rank in range(RANKS)]
    assert messages == ["1 images were seen by more than one rank"] * RANKS
