"""Two gloo ranks, with even shares or one of them idle: the statistics of one process, on every rank."""

import json
from pathlib import Path

import pytest
import torch
from core import metrics_ranks
from launch import launch

from neon_metrics import neighbours

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
    reference, real = metrics_ranks.references()
    values = one.compute(reference, real)
    assert set(values) >= {"fid", "is_mean", "is_std", "kid_mean", "precision", "recall", "density", "coverage"}
    assert total.compute(reference, real) == pytest.approx(values, rel=1e-11)


@pytest.mark.parametrize("pieces", [metrics_ranks.PIECES, 1 << 24])
def test_neighbours_and_subsets_that_ranks_share_give_the_numbers_of_one_process(folder, pieces, monkeypatch):
    """Bit for bit, in pieces of any size."""
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", pieces)
    alone = metrics_ranks.accumulate(list(range(metrics_ranks.NUM_IMAGES))).compute(*metrics_ranks.references())
    for rank in range(RANKS):
        together = json.loads((folder / f"values-{rank}.json").read_text(encoding="utf-8"))
        exact = ("kid_mean", "kid_std", "precision", "recall", "density", "coverage")
        assert {name: together[name] for name in exact} == {name: alone[name] for name in exact}
        assert together == pytest.approx(alone, rel=1e-11)


def test_an_image_on_two_ranks_is_an_error_on_both(folder):
    messages = [(folder / f"error-{rank}.txt").read_text(encoding="utf-8") for rank in range(RANKS)]
    assert messages == ["1 images were seen by more than one rank"] * RANKS


def test_a_sum_over_the_ranks_is_right_and_timed(folder):
    """Of `neon check`; a wrong one would have ended the launch."""
    for rank in range(RANKS):
        measured = json.loads((folder / f"sum-{rank}.json").read_text(encoding="utf-8"))
        assert measured["ranks"] == RANKS and 0 < measured["seconds"] < 60
