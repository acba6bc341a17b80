"""Points of a sweep whose statistics grow, from 5,000 images to 10,000 and 50,000, without sampling an image twice.

<out>/statistics/<snapshot>-w1.4-cfg2.7-<hash>.pt    the images of this setting so far
<out>/points/<snapshot>-w1.4-cfg2.7-n5000-<hash>.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.distributed import barrier, broadcast_object, is_main, on_rank_0, print0, world_size
from neon_core.pixels import NotFiniteImages
from neon_core.seeds import format_seeds
from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.run_files import intact, read_tensors, write_record
from neon_files.tracking import track
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.evaluate import evaluate
from neon_metrics.kept import KeptWork
from neon_run.search.sweep import BASE, Sweep


class _Slice(MetricAccumulator):
    """Counts image i of a slice as image `offset + i` of the whole run."""

    offset = 0

    def update(self, images: Tensor, indices: Tensor | Iterable[int]) -> None:
        super().update(images, [int(i) + self.offset for i in indices])


class GrowingSweep(Sweep):
    """A sweep whose points are the first n images of one seed list, for growing n.

    The statistics are those of the whole list, of which the first n images have been seen: so the Inception Score,
    whose split depends on the final number, is right at the end too. Features are kept (float32), for KID, precision
    and recall, and the bootstrap.
    """

    def grown(self, snapshot: str, w: float, seeds: Sequence[int], count: int, **varied: Any) -> dict[str, Any]:
        """FID of the first `count` of `seeds` at one setting, measured earlier or now; at the full count every metric.
        Infinite where the images are not finite.

        Every rank calls it and gets the same. `sampled` counts the images that were sampled for it now.
        """
        identity, settings = self.describe(snapshot, w, seeds, **varied)
        path = self._path(identity, varied, count)
        point = self._earlier(path)
        if point is None:
            began = time.monotonic()
            try:
                total, sampled = self._sampled(identity, settings, seeds, count, varied)
                values: dict[str, Any] = dict(self._values(total))
            except NotFiniteImages as error:  # on every rank alike
                sampled, values = 0, {"fid": math.inf, "not_finite": error.message}
            point = broadcast_object(
                {
                    **identity,
                    **values,
                    "num_images": count,
                    "sampled": sampled,
                    "seconds": round(time.monotonic() - began, 3),
                    "world_size": world_size(),
                    "device": str(self.evaluator.device),
                    "detector": self.evaluator.detector.name,
                    "detector_is_official": self.evaluator.detector.official,
                    "torch": torch.__version__,
                }
            )
            point = json.loads(json.dumps(point, default=str))
            if math.isnan(point["fid"]):
                raise UserError(
                    f"the distance of {count} images is not a number ({identity['snapshot']}, w = {w:g}); see what "
                    f"{self.evaluator.detector.name} makes of such images"
                )
            if is_main():
                write_record(path, point)
            barrier()
        text = "".join(f" | {name}={value:g}" for name, value in varied.items() if value is not None)
        track({f"search/FID of {identity['snapshot']}{text}, over 1000 w": point["fid"]}, round(1000 * w))
        print0(f"{identity['snapshot']} | w={w:g}{text} | images={count} | FID={point['fid']:.6f}")
        return point

    def statistics(self, snapshot: str, w: float, seeds: Sequence[int], **varied: Any) -> MetricAccumulator | None:
        """Those of all `seeds` at this setting, on rank 0, sampled again where their file is gone; None elsewhere.
        Every rank calls it."""
        identity, settings = self.describe(snapshot, w, seeds, **varied)
        return self._sampled(identity, settings, seeds, len(seeds), varied)[0]

    def describe(self, snapshot: str, w: float, seeds: Sequence[int], **varied: Any) -> tuple[dict, dict]:
        """(everything that the statistics of a setting depend on, the sampler's settings)."""
        snapshot = BASE if w == 0 else snapshot
        settings = {**self.settings, **{name: value for name, value in varied.items() if value is not None}}
        identity = {"snapshot": snapshot, "w": w, "settings": settings, "seeds": format_seeds(seeds), **self.identity}
        if snapshot != BASE:
            identity["snapshot_sha256"] = self._hash(snapshot)
        return identity, settings

    def _sampled(self, identity, settings, seeds, count, varied) -> tuple[MetricAccumulator | None, int]:
        """The statistics of the first `count` images on rank 0, and how many were sampled for them now."""
        path = self._statistics_path(identity, varied)
        total = self._load(path, len(seeds))
        start = broadcast_object(0 if total is None else total.num_seen)
        if start >= count:
            return self._first(total, count), 0
        self._check_labels(seeds, start, count, settings)
        self.move(identity["snapshot"], identity["w"])

        def new_accumulator() -> MetricAccumulator:
            part = _Slice(self.evaluator.detector, len(seeds), self.evaluator.metrics, keep_features=True)
            part.offset = start
            return part

        kept = KeptWork(self.out_dir / "partial", {**identity, "start": start, "count": count})
        options = {"settings": settings, "batch_size": self.batch_size, "kept": kept}
        try:
            part = evaluate(self.backbone, seeds[start:count], new_accumulator, **options)
        except NotFiniteImages:  # a point of infinite FID, which nothing continues
            kept.clear()
            raise
        if is_main():
            if total is None:
                total = part
            else:
                total.merge(part)
            with atomic_path(path) as temporary:
                torch.save(total.state_dict(), temporary)
            kept.clear()
        barrier()
        return total, count - start

    def _first(self, total: MetricAccumulator | None, count: int) -> MetricAccumulator | None:
        """The first `count` of the images in `total`, from their features: sums cannot be undone."""
        if total is None or total.num_seen == count:
            return total
        metrics = {"fid"} & set(self.evaluator.metrics)
        few = MetricAccumulator(self.evaluator.detector, total.num_images, metrics, keep_features=True)
        if few.feature_statistics is not None:
            few.feature_statistics.update(total.rows[:count])
        few.rows[:count] = total.rows[:count]
        few.seen[:count] = True
        return few

    def _values(self, total: MetricAccumulator | None) -> dict[str, float]:
        """FID, and every metric once all images have been seen. `total` is on rank 0, None elsewhere."""
        evaluator = self.evaluator
        complete = broadcast_object(total is not None and bool(total.seen.all()))
        if complete and {"kid", "prdc"} & set(evaluator.metrics):  # computed by all ranks together
            state = broadcast_object(None if total is None else (total.num_images, total.state_dict()))
            if total is None:
                total = self._empty(state[0])
                total.load_state_dict(state[1])
            return evaluator.compute(total, self.batch_size)

        measure: Callable[[Any], dict[str, float]] = evaluator.distance
        if complete:
            measure = partial(evaluator.compute, batch_size=self.batch_size)
        return on_rank_0(lambda: measure(total))

    def _empty(self, count: int) -> MetricAccumulator:
        """For the first images of `count`."""
        return MetricAccumulator(self.evaluator.detector, count, self.evaluator.metrics, keep_features=True)

    def _load(self, path: Path, whole: int) -> MetricAccumulator | None:
        if not is_main():
            return None
        total = self._empty(whole)

        def load(saved: dict[str, Any]) -> bool:
            total.load_state_dict(saved)
            return True

        return total if intact(path, read_tensors, load) else None

    def _statistics_path(self, identity: dict, varied: dict) -> Path:
        name = self._path(identity, varied, 0).stem.replace("-n0-", "-")
        return self.out_dir / "statistics" / f"{name}.pt"

    def _check_labels(self, seeds: Sequence[int], start: int, count: int, settings: dict) -> None:
        """UserError where an image's class depends on the length of the list: a grown set would be another one."""
        part = self.backbone.assign_labels(seeds[start:count], **settings)
        if part is None:
            return
        few = self.backbone.assign_labels(seeds[start : start + 1 + (count - start) // 2], **settings)
        if few is None or not torch.equal(part[: len(few)], few):
            raise UserError(
                "with these sampler settings a label depends on the number of images, which a search varies"
            )
