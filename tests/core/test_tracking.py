"""`--log`: what goes to a tracker, and nothing where there is none."""

import sys
import types

import numpy as np
import pytest

from neon_files.errors import UserError
from neon_files.tracking import is_tracked, track, track_picture, tracking


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it was given."""
    given = []
    run = types.SimpleNamespace(log=given.append, finish=lambda: given.append("finished"))
    package = types.ModuleType("wandb")
    package.init, package.Image = (lambda **options: run), (lambda pixels: pixels)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return given


def test_numbers_and_pictures_reach_the_tracker(wandb, tmp_path):
    with tracking("wandb", tmp_path / "run.logs"):
        assert is_tracked()
        track({"fid": 2.5, "reference": "name"}, 100)
        track_picture("S", np.zeros((6, 3, 4, 4), np.uint8))
    numbers, picture, end = wandb
    assert numbers == {"fid": 2.5, "step": 100} and end == "finished"
    assert picture["S"].shape == (3 * 4, 2 * 4, 3)
    assert not is_tracked()


@pytest.mark.parametrize("kind, here", [("none", True), ("wandb", False)])
def test_nothing_is_tracked_by_default_and_on_other_ranks(wandb, tmp_path, kind, here):
    with tracking(kind, tmp_path / "run.logs", here):
        track({"fid": 2.5}, 100)
    assert wandb == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_package_that_is_missing_is_one_sentence(monkeypatch, tmp_path, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused = pytest.raises(UserError, match=f"--log {kind}: its package is not installed; run `pip install {kind}`")
    with refused, tracking(kind, tmp_path / "run.logs"):
        raise AssertionError
    assert not is_tracked()


def test_tensorboard_gets_its_files(tmp_path):
    pytest.importorskip("tensorboard")
    with tracking("tensorboard", tmp_path / "run.logs"):
        track({"loss": 1.0}, 5)
        track_picture("S", np.zeros((4, 1, 4, 4), np.uint8))
    (file,) = (tmp_path / "run.logs").iterdir()
    assert b"loss" in file.read_bytes()
