"""One seed of the quickstart: `neon reproduce` on the digits' row, and the record of its results.

The folder of a seed is that of a `neon reproduce`: report.html, results.json, neon.safetensors, all stages; and
summary.json, the record.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from neon_core.merge import NeonWeights, neon_merge
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.digits import load_digits_split, to_unit_range
from neon_edm.quickstart.prepare import BATCH, CPU
from neon_edm.quickstart.settings import SAMPLE_BATCH, SAMPLES, Quickstart
from neon_files.atomic import write_json
from neon_files.checkpoint import read_checkpoint
from neon_metrics.scores import frechet_distance
from neon_metrics.statistics import FeatureStatistics
from neon_run.reproduce.measure import RANDOM, REAL
from neon_run.reproduce.reproduction import Reproduction
from neon_run.search.quick import Budget
from neon_run.search.sweep import BASE

PIXEL_IMAGES = 1000  # of the distances in pixels
STAGES = {"fetch": "base", "generate": "synthetic set", "finetune": "fine-tune", "search": "choose w"}

Progress = Callable[[str, int], None]  # (stage, network passes done since the last call)


def run_seed(quickstart: Quickstart, seed: int, out_dir: Path, progress: Progress) -> dict:
    """The record of one seed, JSON, also written to `out_dir`/summary.json.

    Raises UserError where the folder holds stages of a run with other settings.
    """
    began, stage = time.monotonic(), ""

    def begin(name: str) -> None:
        nonlocal stage
        stage = STAGES.get(name, name)
        progress(stage, 0)

    class Watched(DigitsBackbone):
        on_passes = staticmethod(lambda passes: progress(stage, passes))

    row, plan = quickstart.row(seed, Watched), quickstart.plan(seed)
    run = Reproduction(row, out_dir, plan, CPU, shlex.join(["python", *sys.argv]), begin)
    results = run.run()
    begin("pixels")
    record = {"identity": identity(quickstart, seed), **distances(quickstart, seed, results), **weights(run, results)}
    record["seconds"] = {cost["stage"]: cost["seconds"] for cost in results["ledger"]}
    record["seconds"]["this start"] = round(time.monotonic() - began, 2)
    write_json(out_dir / "summary.json", record)  # last: a folder that has it is finished
    return record


def find_result(quickstart: Quickstart, seed: int, out_dir: Path) -> dict | None:
    """The record that an earlier run of the same settings left in `out_dir`."""
    path = out_dir / "summary.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return record if record and record["identity"] == identity(quickstart, seed) else None


def identity(quickstart: Quickstart, seed: int) -> dict:
    return json.loads(json.dumps({"seed": seed, "settings": dataclasses.asdict(quickstart)}, default=str))


def passes_per_seed(quickstart: Quickstart) -> int:
    """About how many network passes a seed takes: a training image counts 3, a sample 35."""
    trained = quickstart.base.images + 2 * quickstart.train.images + quickstart.feature_steps * BATCH
    searched = (Budget().settings[0] - 2) * quickstart.ranking_images + 3 * quickstart.num_evaluate
    reported = (len(quickstart.curve) + 6) * quickstart.num_evaluate
    shown = 3 * SAMPLES[0] * SAMPLES[1] + 4 * min(PIXEL_IMAGES, quickstart.num_evaluate)
    return 3 * trained + 35 * (quickstart.num_synthetic + searched + reported + shown)


def distances(quickstart: Quickstart, seed: int, results: dict) -> dict:
    """The distances of `results` by place, to training digits (on which w was chosen) and to held-out ones."""
    best = results["best"]
    fresh = {(p["snapshot"], p["w"]): p for p in results["points"]["evaluate"] if p["block"] == "second"}
    places = {
        "base": (BASE, 0.0),
        "self_trained": (best["snapshot"], -1.0),
        "neon_fixed": (best["snapshot"], quickstart.w),
        "neon": (best["snapshot"], best["w"]),
        "random_direction": (RANDOM, best["w"]),
        "real_data": (REAL, -1.0),
    }

    def at(snapshot: str, w: float) -> dict[str, float]:
        point = fresh[BASE if w == 0 else snapshot, w]
        return {"train": point["fid"], "heldout": point["fid_heldout"]}

    line = sorted(w for snapshot, w in fresh if snapshot in (BASE, best["snapshot"]))
    return {
        "seed": seed,
        "w_star": best["w"],
        "report": {name: at(*place) for name, place in places.items()},
        "curve": [{"w": w, **at(best["snapshot"], w)} for w in line],
        "images": sum(cost.get("images", 0) for cost in results["ledger"]),
    }


def weights(run: Reproduction, results: dict) -> dict:
    """Measurements of weights and pixels: the length of the step, the error of w = -1 against theta_syn, and pixel
    distance and variance of the first images of the report."""
    best = results["best"]
    backbone = run.model.load()
    theta_syn = read_checkpoint(run.snapshots[best["snapshot"]]).state
    theta_base = read_checkpoint(run.files["base"]).state
    line = NeonWeights(backbone.net, theta_base, theta_syn)
    minus_one = neon_merge(theta_base, theta_syn, -1.0)
    digits = load_digits_split(run.plan.seed)
    train, heldout = (_pixels([images]) for images in (digits.train_images, digits.heldout_images))
    seeds = range(run.seeds[-1] + 1, run.seeds[-1] + 1 + min(PIXEL_IMAGES, len(run.seeds)))
    pixels = {}
    for name, w in (("base", 0.0), ("self_trained", -1.0), ("neon_fixed", run.row.w), ("neon", best["w"])):
        line.set(w)
        parts = (seeds[i : i + SAMPLE_BATCH] for i in range(0, len(seeds), SAMPLE_BATCH))
        drawn = (backbone.sample(part, backbone.assign_labels(part), **run.row.evaluate) for part in parts)
        pixels[name] = _against(_pixels(drawn), heldout)
    return {
        "heldout_accuracy": read_checkpoint(run.files["detector"]).metadata["heldout_accuracy"],
        "step_length": line.distance(),
        "minus_one_error": max(float((minus_one[name] - theta_syn[name]).abs().max()) for name in theta_syn),
        "pixels": pixels,
        "real": _against(train, heldout) | {"heldout": _real_distance(run)},
    }


def _pixels(batches) -> FeatureStatistics:
    statistics = FeatureStatistics(64)
    for images in batches:
        statistics.update(to_unit_range(images).flatten(1))
    return statistics


def _against(measured: FeatureStatistics, heldout: FeatureStatistics) -> dict[str, float]:
    ends = (measured.mean, measured.covariance(), heldout.mean, heldout.covariance())
    return {"pixels": frechet_distance(*ends), "variance": float(measured.covariance().trace())}


def _real_distance(run: Reproduction) -> float:
    """Between the features of training and held-out digits, for comparison."""
    train, heldout = run.evaluator.reference, run.evaluator.heldout
    assert train is not None and heldout is not None
    return frechet_distance(train.mu, train.sigma, heldout.mu, heldout.sigma)
