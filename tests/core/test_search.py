"""The search finds the bottom of a bowl, survives surfaces that are none, and counts its images honestly."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from neon_run.search.quick import (
    Axis,
    Budget,
    Point,
    first_design,
    fit_quadratic,
    next_point,
    quadratic_features,
    ranked,
    search,
)

W, G = Axis(0.0, 2.4, 1.0, 0.5), Axis(1.4, 4.0, 2.6, 0.5)


def bowl(w, g, at=(1.5, 3.3)):
    a, b = w - at[0], g - at[1]
    return 1.0 + 2 * a * a + 0.8 * b * b - 1.5 * a * b


def load_benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "search.py"
    spec = importlib.util.spec_from_file_location("search_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def over_bowl(snapshot, w, settings, images):
    return bowl(w, settings["g"])


def test_a_diagonal_bowl_is_found():
    found = search(over_bowl, {"a": 1.0}, W, {"g": G})
    assert bowl(found.best.w, found.best.settings["g"]) - 1.0 < 0.01
    assert len({p.place for p in found.points}) <= 10 and found.images <= 60_000


def test_one_axis_alone_needs_half_the_settings():
    found = search(lambda s, w, settings, n: (w - 1.7) ** 2, {"a": 1.0}, W, {})
    assert abs(found.best.w - 1.7) < 0.1 and found.best.settings == {}
    assert len({p.w for p in found.points}) <= 5


def test_along_w_and_guidance_the_settings_are_those_that_the_tables_of_the_docs_are_of():
    """Recorded before there were further axes."""
    found = search(over_bowl, {"a": 1.0}, W, {"g": G})
    visited = [(1, 2.6), (1.5, 2.6), (0.5, 2.6), (1, 3.1), (1, 2.1), (1.5, 3.1), (1.5, 3.3083), (1.5583, 3.3958),
               (1.4475, 3.2208), (1.5525, 3.2138), (1.5, 3.3083), (1.4475, 3.2208)]  # fmt: skip
    assert [(p.w, p.settings["g"]) for p in found.points] == [pytest.approx(place, abs=1e-4) for place in visited]
    found = search(lambda s, w, settings, n: bowl(w, 2.6), {"a": 1.0, "b": 2.0}, W, {})
    alone = [1, 1.5, 0.5, 1.2292, 1.3458, 0.6146, 0.6671, 0.7931, 1.2292, 1.3458]
    assert [p.w for p in found.points] == pytest.approx(alone, abs=1e-4) and [p.snapshot for p in found.points] == [
        *"aaaaabbbaa"
    ]


@pytest.mark.parametrize("start", [0.0, 0.05, 2.4])
def test_a_start_at_the_edge_of_the_box_still_has_three_values_on_the_axis(start):
    design = np.array(first_design([Axis(0.0, 2.4, start, 0.5), G]))
    values = np.unique(design[:, 0])
    assert len(values) == 3 and np.diff(values).min() > 0.1 and values.min() >= 0 and values.max() <= 2.4


def test_one_lucky_measurement_does_not_become_the_best():
    places = [(w, g) for w in (1.0, 1.5, 2.0) for g in (2.6, 3.2, 3.3, 3.4, 4.0)]
    lucky = (1.5, 3.4)
    points = [Point("a", w, {"g": g}, w, 1, bowl(w, g) - (0.012 if (w, g) == lucky else 0.0)) for w, g in places]
    assert min(points, key=lambda p: p.fid).settings["g"] == 3.4
    assert (ranked(points, [W, G])[0].w, ranked(points, [W, G])[0].settings["g"]) == (1.5, 3.3)


def test_simulated_noisy_surfaces_a_tenth_of_the_images():
    benchmark = load_benchmark()
    surfaces = [benchmark.Valley(kind, seed) for kind in benchmark.KINDS for seed in range(10)]
    images, regret = np.array([surface.ours() for surface in surfaces]).T
    grid_images, _ = np.array([surface.official() for surface in surfaces]).T
    assert images.mean() <= 0.1 * grid_images.mean()
    assert np.mean(regret <= 0.02) >= 0.9


def test_a_third_axis_costs_eight_settings_more():
    benchmark = load_benchmark()
    surfaces = [benchmark.Sheet(kind, seed) for kind in ("quadratic", "skew", "wall", "turned") for seed in range(2)]
    images, regret = np.array([surface.ours() for surface in surfaces]).T
    assert images.max() <= 100_000 and np.mean(regret <= 0.02) >= 0.75 and regret.max() < 0.05


def test_the_box_is_never_left():
    asked = []

    def measure(s, w, settings, n):
        asked.append((w, settings["g"]))
        return -w - settings["g"]  # downhill to the corner

    found = search(measure, {"a": 1.0}, W, {"g": G})
    assert (found.best.w, found.best.settings["g"]) == pytest.approx((2.4, 4.0), abs=0.05)
    assert all(0 <= w <= 2.4 and 1.4 <= g <= 4.0 for w, g in asked)


def test_a_saddle_leads_to_the_rim_of_the_trust_region_and_not_away():
    points = [Point("a", w, {"g": g}, w, 1, float(w * w - 2 * g * g)) for w in (0.5, 1.0, 1.5) for g in (2.1, 2.6)]
    x, gain = next_point(points, [W, G], radius=1.0)
    best = min(points, key=lambda p: p.fid)
    distance = np.hypot((x[0] - best.u) / W.step, (x[1] - best.settings["g"]) / G.step)
    assert 0.9 <= distance <= 1.0 + 1e-9 and gain > 0


def test_the_fit_is_exact_on_a_quadratic_with_offsets_between_snapshots():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (40, 2))
    true = np.array([1.0, 0.3, -0.2, 0.7, 0.4, 0.5])
    y = quadratic_features(x) @ true + np.repeat([0.0, 5.0], 20)
    found = fit_quadratic(x, y, groups=["a"] * 20 + ["b"] * 20)
    assert np.allclose(found, true, atol=0.02)


def test_the_next_snapshot_starts_where_the_step_has_the_same_length():
    asked = []

    def measure(s, w, settings, n):
        asked.append((s, w))
        return bowl(w * {"short": 1.0, "long": 2.0}[s], settings["g"])

    found = search(measure, {"short": 1.0, "long": 2.0}, W, {"g": G})
    first_long = next(w for s, w in asked if s == "long")
    best_short = min((p for p in found.points if p.snapshot == "short"), key=lambda p: p.fid)
    assert first_long == pytest.approx(best_short.w / 2, abs=1e-6)
    assert sum(s == "long" for s, _ in asked) < sum(s == "short" for s, _ in asked)


def test_the_best_snapshot_is_searched_to_the_end_and_the_others_are_not():
    floors = {"a": 0.3, "b": 0.0, "c": 0.3}
    measure = lambda s, w, settings, n: floors[s] + bowl(w, settings["g"])  # noqa: E731
    found = search(measure, dict.fromkeys(floors, 1.0), W, {"g": G}, Budget(settings_next=(3, 4)))
    settings = {s: len({p.place for p in found.points if p.snapshot == s}) for s in floors}
    assert found.best.snapshot == "b" and settings == {"a": 10, "b": 10, "c": 4}


def test_images_are_counted_once_per_setting():
    budget = Budget(settings=(5, 8), ranking_images=100, deciding_images=400)
    found = search(over_bowl, {"a": 1.0}, W, {"g": G}, budget)
    assert found.images == 6 * 100 + 2 * 400


def test_the_same_search_twice_asks_the_same():
    logs = []
    for _ in range(2):
        log = []
        logged = lambda *place, log=log: log.append(place) or over_bowl(*place)  # noqa: E731
        search(logged, {"a": 1.0}, W, {"g": G})
        logs.append(log)
    assert logs[0] == logs[1]
