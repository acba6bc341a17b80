"""The claim of a row is held against ratios on fresh seeds, and its gain against the chance between runs."""

import math

import pytest

from neon_run.reproduce import acceptance
from neon_run.reproduce.measure import LONGER, RANDOM, REAL
from neon_run.search.sweep import BASE

CLAIM = {"neon": 0.85, "self_trained": 1.3, "controls": 0.94}
PLACES = {  # (snapshot, w, guidance) -> held-out distance on the second block; the third has 0.1 more
    (BASE, 0.0, 2.0): 4.0,
    ("snapshot-1", -1.0, 3.0): 8.0,
    ("snapshot-1", 1.5, 3.0): 3.0,
    (RANDOM, 1.5, 3.0): 5.0,
    (REAL, 1.5, 3.0): 4.5,
    (REAL, -1.0, 3.0): 4.2,
    (LONGER, -1.0, 2.0): 3.6,
}


def run(claim=CLAIM, **changed):
    points = [
        {
            "snapshot": s,
            "w": w,
            "settings": {"cfg": g},
            "block": block,
            "num_images": n,
            "fid": 99.0,
            "fid_heldout": value + more,
        }
        for (s, w, g), value in PLACES.items()
        for block, more in (("third", 0.1), ("second", 0.0), ("first", -9.0))
        for n in (5000, 6000)
    ]
    for point in points:
        point["fid_heldout"] += (
            changed.get(point["snapshot"], 0.0) if point["w"] > 0 or point["snapshot"] == BASE else 0
        )
        point["fid_heldout"] -= 0.5 if point["num_images"] == 6000 else 0  # fewer images give larger distances
    best = {"snapshot": "snapshot-1", "w": 1.5, "settings": {"cfg": 3.0}}
    evaluated = {"points": {"evaluate": points}, "best": best, "base_best": {"settings": {"cfg": 2.0}}}
    return {"row": "edm/x", "acceptance": claim, **evaluated}


def test_distances_are_held_out_on_fresh_blocks_in_their_order():
    found = acceptance.distances(run())
    assert found["base"] == [3.5, pytest.approx(3.6)] and found["neon"] == [2.5, pytest.approx(2.6)]
    assert found["random"] == [5.0, pytest.approx(5.1)]
    assert list(found) == list(acceptance.PLACES)


def test_ratios_are_of_equally_many_images():
    """Base and Neon of all of a block, controls of fewer, as is the base that they are divided by."""
    found = acceptance.ratios(run())
    assert found["neon"] == pytest.approx(2.55 / 3.55) and found["random"] == pytest.approx(5.05 / 4.05)


def test_of_a_control_at_two_settings_the_better_one_is_the_opponent():
    result = run()
    for block, fid in (("second", 4.1), ("third", 4.3)):
        place = {"snapshot": RANDOM, "w": 1.5, "settings": {"cfg": 2.0}}
        result["points"]["evaluate"].append(place | {"block": block, "num_images": 5000, "fid": fid})
    assert acceptance.distances(result)["random"] == [4.1, 4.3]
    assert acceptance.distances(run())["random"] == [5.0, pytest.approx(5.1)]


def test_a_claim_that_holds_has_no_failures():
    assert acceptance.failures(run()) == []
    assert acceptance.failures(run(claim=None, BASE=9.0)) == []


def test_every_part_of_a_claim_can_fail():
    assert [text.split(":")[0] for text in acceptance.failures(run(**{"snapshot-1": 1.0}))] == ["Neon"]
    assert "0.850" not in acceptance.failures(run(**{"snapshot-1": 1.0}))[0]
    assert [text.split(":")[0] for text in acceptance.failures(run(**{RANDOM: -2.0}))] == ["random direction"]
    assert [text.split(":")[0] for text in acceptance.failures(run(**{REAL: -2.0}))] == ["away from real"]
    assert [text.split(":")[0] for text in acceptance.failures(run(**{BASE: 3.0}))] == [
        "random direction", "away from real", "self-trained",
    ]  # fmt: skip


def test_a_part_of_the_claim_that_was_not_measured_is_a_failure():
    result = run()
    result["points"]["evaluate"] = [p for p in result["points"]["evaluate"] if p["snapshot"] != RANDOM]
    assert acceptance.failures(result) == ["random direction: nan of the base, claimed at least 0.94"]


def test_the_gain_is_a_part_of_the_base_with_students_interval_over_runs():
    runs = [run(), run(**{"snapshot-1": 0.2}), run(**{"snapshot-1": -0.2})]
    gain = acceptance.gains(runs)
    error = 0.2 / 3.55 / math.sqrt(3)
    assert gain["mean"] == pytest.approx(1 - 2.55 / 3.55) and gain["standard_error"] == pytest.approx(error)
    assert gain["low"] == pytest.approx(gain["mean"] - 4.302653 * error, abs=1e-6)
    assert gain["sigmas"] == pytest.approx(gain["mean"] / error) and acceptance.gains([run()]) is None
