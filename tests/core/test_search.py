"""The search finds the bottom of a bowl, survives surfaces that are none, and counts its images honestly."""

import numpy as np
import pytest

from neon_core.pipeline.search import Axis, Budget, Point, fit_quadratic, next_point, quadratic_features, search

W, G = Axis(0.0, 2.4, 1.0, 0.5), Axis(1.4, 4.0, 2.6, 0.5)


def bowl(w, g, at=(1.5, 3.3)):
    a, b = w - at[0], g - at[1]
    return 1.0 + 2 * a * a + 0.8 * b * b - 1.5 * a * b


def test_a_diagonal_bowl_is_found():
    found = search(lambda s, w, g, n: bowl(w, g), {"a": 1.0}, W, G)
    assert bowl(found.best.w, found.best.guidance) - 1.0 < 0.01
    assert len(found.points) <= 14


def test_one_axis_alone():
    found = search(lambda s, w, g, n: (w - 1.7) ** 2, {"a": 1.0}, W, None, Budget(settings=7))
    assert abs(found.best.w - 1.7) < 0.1 and found.best.guidance is None


def test_the_box_is_never_left():
    asked = []

    def measure(s, w, g, n):
        asked.append((w, g))
        return -w - g  # downhill to the corner

    found = search(measure, {"a": 1.0}, W, G)
    assert (found.best.w, found.best.guidance) == pytest.approx((2.4, 4.0), abs=0.05)
    assert all(0 <= w <= 2.4 and 1.4 <= g <= 4.0 for w, g in asked)


def test_a_saddle_leads_to_the_rim_of_the_trust_region_and_not_away():
    points = [Point("a", w, g, w, 1, float(w * w - 2 * g * g)) for w in (0.5, 1.0, 1.5) for g in (2.1, 2.6)]
    x, gain = next_point(points, [W, G], radius=1.0)
    best = min(points, key=lambda p: p.fid)
    distance = np.hypot((x[0] - best.u) / W.step, (x[1] - best.guidance) / G.step)
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

    def measure(s, w, g, n):
        asked.append((s, w))
        return bowl(w * {"short": 1.0, "long": 2.0}[s], g)

    found = search(measure, {"short": 1.0, "long": 2.0}, W, G)
    first_long = next(w for s, w in asked if s == "long")
    best_short = min((p for p in found.points if p.snapshot == "short"), key=lambda p: p.fid)
    assert first_long == pytest.approx(best_short.w / 2, abs=1e-6)
    assert sum(s == "long" for s, _ in asked) <= 6


def test_images_are_counted_once_per_setting():
    budget = Budget(settings=8, ranking_images=100, deciding_images=400)
    found = search(lambda s, w, g, n: bowl(w, g), {"a": 1.0}, W, G, budget)
    assert found.images == 6 * 100 + 2 * 400


def test_the_same_search_twice_asks_the_same():
    logs = []
    for _ in range(2):
        log = []
        search(lambda s, w, g, n, log=log: log.append((w, g, n)) or bowl(w, g), {"a": 1.0}, W, G)
        logs.append(log)
    assert logs[0] == logs[1]
