"""A network that gives NaN is an error, never a black image: in every cast, in a set, in an evaluation, in a sweep."""

import math

import numpy as np
import pytest
import torch
from core.pico import PicoBackbone, PixelMoments

from neon_core.pixels import NotFiniteImages, check_finite
from neon_core.synthetic import generate_set
from neon_edm.sampler import to_uint8 as edm_cast
from neon_files.errors import UserError
from neon_imm.latents import RgbCodec, to_pixels
from neon_metrics.evaluate import EvaluateOptions, Evaluator
from neon_metrics.reference import Reference
from neon_run.row import Grid
from neon_run.search.find import _official
from neon_run.search.growing import GrowingSweep
from neon_run.search.quick import Axis, search
from neon_run.search.sweep import BASE, Sweep, early_stopped_grid
from neon_var.sampler import to_uint8 as var_cast
from neon_xar.vae import to_uint8 as xar_cast

CASTS = {"edm": edm_cast, "var": var_cast, "xar": xar_cast, "imm vae": to_pixels, "imm rgb": RgbCodec(3).decode}


class Failing(PicoBackbone):
    """Gives NaN for some seeds, as a network does that was pushed too far."""

    bad = ()
    sampled = 0

    def sample(self, seeds, labels, **settings):
        self.sampled += len(seeds)
        values = torch.zeros(len(seeds), 3)
        values[[seed in self.bad for seed in seeds]] = float("nan")
        check_finite(values)
        return super().sample(seeds, labels, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", CASTS)
def test_no_cast_turns_what_is_not_finite_into_a_colour(name, value):
    images = torch.zeros(4, 3, 2, 2)
    images[2, 1, 0, 1] = value
    with pytest.raises(NotFiniteImages) as error:
        CASTS[name](images)
    assert error.value.row == 2
    assert CASTS[name](images[:2]).dtype == torch.uint8


def test_a_set_names_the_seed_and_is_not_finished(tmp_path):
    backbone = Failing.fresh()
    backbone.bad = (13, 14)
    with pytest.raises(NotFiniteImages, match=r"seed 13: .* not finite"):
        generate_set(backbone, range(4, 24), tmp_path, settings={}, batch_size=4, progress=False)
    assert not (tmp_path / "dataset.json").exists() and len(list(tmp_path.rglob("*.png"))) == 8


def make_evaluator(**options):
    reference = Reference(np.zeros(12), np.eye(12))
    return Evaluator(reference, device=torch.device("cpu"), metrics=("fid",), detector=PixelMoments(), **options)


def test_an_evaluation_names_the_first_seed():
    backbone = Failing.fresh()
    backbone.bad = (13, 7)
    with pytest.raises(NotFiniteImages, match=r"seed 7: .* not finite"):
        make_evaluator()(backbone, range(20), settings={}, batch_size=4, progress=False)


@pytest.mark.parametrize("growing", [False, True])
def test_a_sweep_records_infinity_and_goes_on(tmp_path, monkeypatch, growing):
    """The point is in its file: the next run does not sample it again. Nothing is kept of its other images."""
    monkeypatch.setattr(EvaluateOptions, "save_seconds", 0.0)
    backbone = Failing.fresh()
    kind, make = (GrowingSweep if growing else Sweep), {"settings": {}, "batch_size": 4, "identity": {}}

    def fid(contrast):
        backbone.bad = (13,) if contrast == 9 else ()
        sweep = kind(backbone, make_evaluator(), {}, tmp_path, **make)
        options = ("base", 0.0, range(20), 20) if growing else ("base", 0.0, range(20))
        return (sweep.grown if growing else sweep.measure)(*options, contrast=contrast)

    contrasts = {"contrast": [1.0, 9.0, 2.0]}
    assert early_stopped_grid(["base"], [0.0], contrasts, lambda _, __, s: fid(**s)["fid"])[2] != {"contrast": 9.0}
    before = backbone.sampled
    again = fid(9.0)
    assert again["fid"] == float("inf") and "seed 13" in again["not_finite"] and backbone.sampled == before
    assert not (tmp_path / "partial").exists()


def test_a_search_walks_around_what_is_not_finite():
    w = Axis(low=0.0, high=4.0, start=2.0, step=1.0)
    found = search(lambda s, w, _, n: math.inf if w > 2.4 else (w - 1.3) ** 2 + 2, {"a": 1.0}, w, {})
    assert abs(found.best.w - 1.3) < 0.3 and any(math.isinf(p.fid) for p in found.points)
    with pytest.raises(UserError, match="no setting of the search gave finite images"):
        search(lambda *_: math.inf, {"a": 1.0}, w, {})


def test_a_broken_snapshot_does_not_end_a_search():
    """Whichever it is: every image of one of the three is not finite."""
    w, g = Axis(low=0.0, high=4.0, start=2.0, step=1.0), Axis(low=1.0, high=3.0, start=2.0, step=0.5)
    for broken in "abc":
        bowl = lambda w, g: (w - 1.3) ** 2 + (g - 1.8) ** 2 + 2  # noqa: E731
        fid = lambda s, w, settings, n: math.inf if s == broken else bowl(w, settings["g"])  # noqa: B023, E731
        best = search(fid, dict.fromkeys("abc", 1.0), w, {"g": g}).best
        assert best.snapshot != broken and abs(best.w - 1.3) < 0.3 and abs(best.settings["g"] - 1.8) < 0.3


def test_the_official_grid_goes_on_from_a_broken_snapshot():
    grid = Grid(ws=(1.0, 2.0), num_images=10)
    fid = lambda s, w, g, n: math.inf if s == "a" else w  # noqa: E731
    assert _official(grid, ["a", "b"], fid, 10)[0] == ("b", 1.0, {})
    for broken, message in ((("a",), "no setting of the search"), (("a", BASE), "the base's images are not finite")):
        fid = lambda s, w, g, n: math.inf if s in broken else w  # noqa: B023, E731
        with pytest.raises(UserError, match=message):
            _official(grid, ["a"], fid, 10)
