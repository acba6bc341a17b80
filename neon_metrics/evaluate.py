"""Seeds -> images -> statistics -> one result: the evaluation of every calculate_fid.py and every sweep.

Images stay in memory: each rank samples its batches, extracts features and keeps sums; the sums meet at the end. With
`work_dir`, the sums are saved there regularly, so that a killed evaluation continues, on any number of ranks. They stay
there until the caller has its result on disk and clears them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import agree, gather_objects, is_main, print0, rank, world_size
from neon_core.pixels import NotFiniteImages, sample
from neon_core.seeds import deal, format_seeds, global_batches
from neon_core.synthetic import image_name, write_images
from neon_files.downloads import fetch
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar
from neon_files.stopping import Stopped, signals_wait
from neon_metrics.accumulator import MetricAccumulator, MetricSettings, check_sizes
from neon_metrics.detector import Detector
from neon_metrics.detectors import open_detector
from neon_metrics.image_statistics import check_images, take_in
from neon_metrics.kept import KeptWork
from neon_metrics.reference import Reference, load_reference
from neon_metrics.scores import fid


class Evaluator:
    """Reference, detector and metrics, all checked before a model is built; then called once per setting.

    `reference`: .npz path or URL, or a Reference. `detector`: a Detector, or what `open_detector` takes; None for the
    published Inception. `metrics`: of fid, is, kid, prdc; the last two need `real_images`, a folder or .zip, of which
    every image is decoded once as a check. `heldout`: a second reference, for `fid_heldout`. Every rank makes one.
    Raises UserError.
    """

    def __init__(
        self,
        reference: str | Path | Reference,
        *,
        device: torch.device,
        metrics: Sequence[str] = ("fid", "is"),
        detector: Detector | str | Path | None = None,
        real_images: str | Path | None = None,
        heldout: str | Path | Reference | None = None,
    ):
        if {"kid", "prdc"} & set(metrics) and real_images is None:
            raise UserError("--metrics kid and prdc compare with real images; name a folder or .zip as --real_images")
        self.metrics = tuple(metrics)
        self.reference = _checked(reference)  # the cheap checks first
        self.heldout = None if heldout is None else _checked(heldout)
        opened = open_detector(detector, device)
        for side in (self.reference, self.heldout):
            if side is not None:
                side.check_detector(opened.name, opened.num_features)
        self.detector, self.device = opened, device
        compared = {"kid", "prdc"} & set(metrics)
        self._real_images = (
            _open_real_images(real_images, compared, device) if compared and real_images is not None else None
        )
        self._real_features: Tensor | None = None
        self._kept: KeptWork | None = None

    def new_accumulator(self, num_images: int, file_order: np.ndarray | None = None) -> MetricAccumulator:
        return MetricAccumulator(self.detector, num_images, self.metrics, file_order=file_order)

    def compute(self, total: MetricAccumulator, batch_size: int) -> dict[str, float]:
        """Every selected metric of a complete accumulator. Every rank calls it."""
        values = total.compute(self.reference, self.real_features(batch_size))
        return {**values, **self.heldout_fid(total)}

    def distance(self, total: MetricAccumulator) -> dict[str, float]:
        """{"fid"}, and {"fid_heldout"} where there is a second reference, of the images seen so far."""
        assert total.feature_statistics is not None  # asked for by whoever goes by the distance
        return {"fid": fid(total.feature_statistics, self.reference), **self.heldout_fid(total)}

    def heldout_fid(self, total: MetricAccumulator) -> dict[str, float]:
        """{"fid_heldout"} of the images seen so far; {} without a second reference."""
        if self.heldout is None or total.feature_statistics is None:
            return {}
        return {"fid_heldout": fid(total.feature_statistics, self.heldout)}

    def real_features(self, batch_size: int) -> Tensor | None:
        """float32 [n, D] of the real images, extracted once, shared out over ranks."""
        if self._real_images is not None and self._real_features is None:
            part = MetricAccumulator(self.detector, len(self._real_images), (), keep_features=True)
            self._real_features = take_in(part, self._real_images, self.device, batch_size).features
        return self._real_features

    def __call__(
        self,
        backbone: Backbone,
        seeds: Sequence[int],
        *,
        settings: dict,
        batch_size: int,
        file_order: np.ndarray | None = None,
        work_dir: str | Path | None = None,
        identity: dict | None = None,
        infinite: bool = False,
        **options,
    ) -> dict:
        """Every selected metric of the images of `seeds`, with their settings. `file_order`: see `MetricAccumulator`;
        `options` go to `evaluate`.

        `work_dir` keeps partial sums, also after the end: call `clear` once the result is on disk. `identity` (weights'
        hash and the like) identifies the run that they belong to. With `infinite`, images that are not finite give
        {"fid": infinity, "not_finite": the reason} instead of an error.
        """
        began = time.monotonic()
        sampling = {"seeds": format_seeds(seeds), "settings": settings, "batch_size": batch_size}
        measured = {"detector": self.detector.name, "metrics": sorted(self.metrics)}
        self._kept = None if work_dir is None else KeptWork(work_dir, {**sampling, **measured, **(identity or {})})
        make = lambda: self.new_accumulator(len(seeds), file_order)  # noqa: E731
        try:
            total = evaluate(
                backbone, seeds, make, settings=settings, batch_size=batch_size, kept=self._kept, **options
            )
            values: dict[str, Any] = dict(self.compute(total, batch_size))
        except NotFiniteImages as error:
            if not infinite:
                raise
            values = {"fid": math.inf, "not_finite": error.message}
        return {
            **values,
            "num_images": len(seeds),
            **sampling,
            "reference": self.reference.name,
            "detector": self.detector.name,
            "detector_is_official": self.detector.official,
            "seconds": round(time.monotonic() - began, 2),
            "world_size": world_size(),
            "device": str(self.device),
            "torch": torch.__version__,
        }

    def clear(self) -> None:
        """Remove the partial sums of the last call from its `work_dir`."""
        if self._kept is not None:
            self._kept.clear()


def _open_real_images(path: str | Path, metrics: set[str], device: torch.device) -> ImageSet:
    """Raises UserError, on every rank alike, where they are too few for `metrics`, too many, or cannot be used."""
    images = agree(path, lambda: ImageSet(path, use_labels=False), lambda images: f"{len(images)} images")
    check_sizes(metrics, len(images), MetricSettings(), device, f"are in {images.path}")
    check_images(images)
    return images


def _checked(reference: str | Path | Reference) -> Reference:
    loaded = reference if isinstance(reference, Reference) else load_reference(fetch(reference))
    _ = loaded.factor  # a sigma that is no covariance is refused now, not after the sampling
    return loaded


@dataclass(frozen=True)
class EvaluateOptions:
    """The output of an evaluation, on disk and in the terminal."""

    save_images: str | Path | None = None  # folder of PNGs
    save_seconds: float = 30.0  # between two savings of partial sums
    progress: bool = True


def evaluate(
    backbone: Backbone,
    seeds: Sequence[int],
    new_accumulator: Callable[[], MetricAccumulator],
    *,
    settings: dict,
    batch_size: int,
    kept: KeptWork | None = None,
    **options: Any,
) -> MetricAccumulator:
    """Sample every seed once (repeats count as often as they stand) and return the statistics, reduced over ranks.

    `settings` go to `backbone.sample`. `kept` is where partial sums are saved, from time to time and at the end, and
    where those of an earlier run are found; the caller clears it. `options` are the fields of `EvaluateOptions`. Every
    rank calls it; every rank gets the reduced statistics. Raises NotFiniteImages, on every rank alike.
    """
    output = EvaluateOptions(**options)
    labels = backbone.assign_labels(seeds, **settings)
    batches = global_batches(len(seeds), batch_size)
    accumulator = new_accumulator()
    resumed = kept.resume(accumulator, new_accumulator) if kept else []
    if kept and resumed:
        print0(f"continuing: {len(resumed)} of {len(batches)} batches were done in {kept.folder}")
    mine = deal(len(batches), rank(), world_size(), resumed)
    show: dict[str, Any] = {"desc": "evaluate", "unit": "img", "disable": not (output.progress and is_main())}
    num_resumed = sum(len(batches[b]) for b in resumed)
    finished, saved_at, problem = list(resumed) if is_main() else [], time.monotonic(), None
    with progress_bar(total=len(seeds), initial=num_resumed, **show) as bar, signals_wait() as stop_asked:
        for number, b in enumerate(mine):
            part = list(batches[b])
            try:
                images = sample(backbone, [seeds[i] for i in part], None if labels is None else labels[part], settings)
            except NotFiniteImages as error:
                problem = b, error.message
                break
            accumulator.update(images, torch.tensor(part))
            if output.save_images is not None:
                names = [image_name(i, None if labels is None else int(labels[i])) for i in part]
                write_images(Path(output.save_images), names, images)
            finished.append(b)
            left = len(seeds) - bar.n
            bar.update(min(left, len(part) * world_size()) if number < len(mine) - 1 else left)
            stop = stop_asked()
            last = number == len(mine) - 1
            if kept and (stop or last or time.monotonic() - saved_at >= output.save_seconds):
                kept.save(accumulator, finished)
                saved_at = time.monotonic()
            if stop:
                raise Stopped(stop)
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        raise NotFiniteImages(min(problems)[1])
    return accumulator.reduced()
