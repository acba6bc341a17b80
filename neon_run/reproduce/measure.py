"""The measurements of the report beside the search: base and Neon on all seeds and on others, controls, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, is_main, on_rank_0, print0
from neon_core.seeds import parse_seeds
from neon_files.atomic import atomic_path
from neon_files.checkpoint import read_checkpoint, read_state, write_checkpoint
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.own_score import ScoreEvaluator
from neon_run.reproduce.controls import random_direction
from neon_run.row import Row
from neon_run.search.find import SearchPlan, images_of, point_of
from neon_run.search.growing import GrowingSweep
from neon_run.search.interval import block_statistics, bootstrap_fids, interval
from neon_run.search.quick import Settings
from neon_run.search.sweep import BASE

RANDOM, REAL, LONGER = "random-direction", "real-data", "longer-training"  # snapshots that are controls
BLOCKS = ("first", "second", "third")  # of seeds: that of the search, then fresh ones
MAX_SAMPLE_SIDE = 192  # pixels in the report


def fresh_blocks(row: Row, plan: Any) -> list[range]:
    """Blocks of seeds that no search sees, behind those of the evaluation and each as long; `plan` is the `Plan`."""
    seeds = parse_seeds(row.evaluate_seeds)
    first, count = max(seeds) + 1, len(seeds)
    number = row.protocol.fresh_blocks if plan.second_block else 0
    return [range(first + i * count, first + (i + 1) * count) for i in range(number)]


@dataclass(frozen=True)
class Measurement:
    """The last stage of a run, with all that it measures. `plan` is the run's `Plan`."""

    row: Row
    plan: Any
    search_plan: SearchPlan
    sweep: GrowingSweep
    seeds: Sequence[int]
    out_dir: Path

    def final(self, searched: Mapping[str, Any]) -> dict[str, Any]:
        """All measurements of the report: base and Neon on all seeds and on fresh blocks, which no search has seen;
        there also the curve over w and the controls (on the first block where there is no other); and samples.

        `searched` is the result of the search. Every rank calls it; sampled images are added to, not sampled again.
        """
        plan, sweep, seeds, best = self.plan, self.sweep, self.seeds, searched["best"]
        of_base, w_best = searched["base_best"]["settings"], best["w"]
        count = self.row.protocol.control_images or self.search_plan.deciding_images
        points: list[dict[str, Any]] = []

        def at(snapshot: str, w: float, settings: Settings, block: str, count: int) -> dict[str, Any]:
            result = sweep.grown(snapshot, w, blocks[block], count, **settings)
            points.append(point_of(result, settings) | {"block": block})
            return result

        # Base and Neon on all seeds.
        fresh = fresh_blocks(self.row, plan)
        blocks = dict(zip(BLOCKS, [seeds, *fresh], strict=False))
        ends = {"base": (BASE, 0.0, of_base), "neon": (best["snapshot"], w_best, best["settings"])}
        whole = {name: at(*end, "first", len(seeds)) for name, end in ends.items()}
        out: dict[str, Any] = {"final": {name: _metrics(result) for name, result in whole.items()}}
        out["intervals"] = self._intervals(ends, whole)
        # Curve and controls, on seeds that no search has seen.
        if plan.controls and w_best:
            sweep.snapshots[RANDOM] = _write_random(sweep, best["snapshot"], plan.seed, self.out_dir / "controls")
        for block in list(blocks)[1:] or ["first"]:
            for control in self._controls(searched, with_curve=block != "third"):
                at(*control, block, count)
            if fresh:
                again = {name: _metrics(at(*end, block, len(seeds))) for name, end in ends.items()}
                out.setdefault("second_block", again)
        # Samples, and the file against the network that was measured.
        settings = {**sweep.settings, **best["settings"]}
        if math.prod(plan.samples):
            _write_samples(sweep, seeds[: math.prod(plan.samples)], best, settings, self.out_dir / "samples")
        out["file_differs_by"] = _difference_of_file(sweep, best, self.out_dir / "neon.safetensors")
        # The cost: images of the search are counted there.
        own = [{k: v for k, v in point.items() if k != "block"} for point in points if point["block"] == "first"]
        others = [[point for point in points if point["block"] == block] for block in list(blocks)[1:]]
        grown = images_of([*searched["points"], *own]) - searched["images"]
        return {**out, "points": points, "images": grown + sum(map(images_of, others))}

    def _controls(self, searched: Mapping[str, Any], with_curve: bool) -> list[tuple[str, float, Settings]]:
        """(snapshot, w, settings) of every control, and of the curve over w."""
        best, of_base = searched["best"], searched["base_best"]["settings"]
        snapshot, w_best, settings = best["snapshot"], best["w"], best["settings"]
        controls = []
        if self.plan.controls:
            curve = self.plan.curve or [round(w_best * part, 6) for part in (0.5, 1.5)]
            ws = [-1.0, *([0.0, *curve] if with_curve else []), w_best]
            controls = [(snapshot, w, settings) for w in dict.fromkeys(ws)]
            controls.append((BASE, 0.0, of_base))
        twice = self.row.protocol.controls_twice and of_base != settings
        either = [settings, of_base] if twice else [settings]
        if twice and self.plan.controls:
            controls.append((snapshot, -1.0, of_base))
        opponents = [(RANDOM, w_best), (REAL, -1.0)]
        if w_best:
            opponents.append((REAL, w_best))  # away from real images: is it S that matters?
        controls += [(*place, chosen) for place in opponents if place[0] in self.sweep.snapshots for chosen in either]
        if LONGER in self.sweep.snapshots:
            controls += [(LONGER, -1.0, chosen) for chosen in (either if twice else [of_base])]
        return controls

    def _intervals(self, ends: Mapping[str, tuple], whole: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Of base, Neon and their difference, by the bootstrap; the same blocks are drawn for both."""
        drawn = {}
        for name, (snapshot, w, settings) in ends.items():
            total = self.sweep.statistics(snapshot, w, self.seeds, **settings)
            print0(f"bootstrap: {name}, {self.plan.resamples} resamples")
            drawn[name] = on_rank_0(partial(self._resampled, total))
        out = {name: interval(whole[name]["fid"], values) for name, values in drawn.items()}
        gain = whole["base"]["fid"] - whole["neon"]["fid"]
        return {**out, "gain": interval(gain, drawn["base"] - drawn["neon"])}

    def _resampled(self, total: MetricAccumulator | None) -> np.ndarray:
        """Distances whose spread is the standard error of that of all images. On rank 0, where `total` is."""
        evaluator = self.sweep.evaluator
        assert total is not None
        if isinstance(evaluator, ScoreEvaluator):
            return evaluator.of_blocks(total)
        blocks = block_statistics(total.rows, self.sweep.batch_size)
        return bootstrap_fids(blocks, evaluator.reference, resamples=self.plan.resamples, seed=self.plan.seed)


def _metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("fid", "fid_heldout", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "density",
            "coverage", "seeds")  # fmt: skip
    return {name: result[name] for name in kept if name in result}


def _difference_of_file(sweep: GrowingSweep, best: Mapping[str, Any], path: Path) -> float:
    """The largest difference of any weight between the merged file and the network that was measured."""
    sweep.move(best["snapshot"], best["w"])
    written, worst = read_checkpoint(path).state, 0.0
    for name, value in sweep.backbone.net.named_parameters():
        worst = max(worst, float((written[name].double() - value.detach().cpu().double()).abs().max()))
    sweep.restore()
    return worst


def _write_random(sweep: GrowingSweep, snapshot: str, seed: int, folder: Path) -> Path:
    path = folder / f"{RANDOM}-{snapshot}-seed{seed}.safetensors"
    if is_main() and not path.exists():
        moved = random_direction(sweep.theta_base, read_state(sweep.snapshots[snapshot], sweep.theta_base), seed)
        metadata = {"control": RANDOM, "seed": seed, "as_long_as": snapshot}
        write_checkpoint(path, moved, config=sweep.backbone.network_config(), metadata=metadata)
    barrier()
    return path


def _write_samples(
    sweep: GrowingSweep, few: Sequence[int], best: Mapping[str, Any], settings: dict[str, Any], folder: Path
) -> None:
    """The same seeds, labels and settings with the three networks: <folder>/{base,self-trained,neon}/00.png."""
    for name, w in (("base", 0.0), ("self-trained", -1.0), ("neon", best["w"])):
        sweep.move(best["snapshot"], w)
        if is_main():
            for number, image in enumerate(_sample(sweep.backbone, few, settings, sweep.batch_size)):
                with atomic_path(folder / name / f"{number:02d}.png") as temporary:
                    _picture(image).save(temporary, format="png")
    sweep.restore()
    barrier()


def _sample(backbone: Backbone, seeds: Sequence[int], settings: dict, batch_size: int) -> Tensor:
    labels = backbone.assign_labels(seeds, **settings)
    parts = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        parts.append(backbone.sample(seeds[part], None if labels is None else labels[part], **settings).cpu())
    return torch.cat(parts)


def _picture(image: Tensor) -> PIL.Image.Image:
    """uint8 [C, H, W], shrunk to the size in a report."""
    array = image.numpy()
    picture = PIL.Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    picture.thumbnail((MAX_SAMPLE_SIDE, MAX_SAMPLE_SIDE))
    return picture
