"""Seeds -> images -> statistics -> one result. What every calculate_fid.py and every sweep calls.

Images stay in memory: each rank samples its batches, extracts features and keeps sums; the sums meet at the end. With
`work_dir`, what is done is kept there from time to time, so that a killed evaluation continues, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, is_main, print0, rank, world_size
from neon_core.seeds import deal, format_seeds, global_batches
from neon_core.synthetic import image_name, write_images
from neon_files.atomic import atomic_path
from neon_files.downloads import fetch
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.detector import Detector, load_inception
from neon_metrics.reference import Reference, load_reference
from neon_metrics.scores import fid


class Evaluator:
    """Reference, detector and wanted metrics, all checked before a model is built; then called once per setting.

    `reference`: .npz path or URL, or a Reference. `detector`: None for the published Inception, a weight file, or any
    Detector. `metrics`: of fid, is, kid, prdc; the last two need `real_images`, a folder or .zip. `heldout`: a second
    reference, for `fid_heldout`. Raises UserError.
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
        if detector is None or isinstance(detector, str | Path):
            detector = load_inception(detector, device)
        for found in (self.reference, self.heldout):
            if found is not None and len(found.mu) != detector.num_features:
                raise UserError(
                    f"{found.name}: made from {len(found.mu)} features, the detector gives {detector.num_features}"
                )
        self.detector, self.device = detector, device
        self._real_images = ImageSet(real_images, use_labels=False) if real_images is not None else None
        self._real_features: Tensor | None = None

    def new_accumulator(self, num_images: int, file_order: np.ndarray | None = None) -> MetricAccumulator:
        return MetricAccumulator(self.detector, num_images, self.metrics, file_order=file_order)

    def compute(self, total: MetricAccumulator, batch_size: int) -> dict[str, float]:
        """Every wanted metric of a complete accumulator. Every rank calls it."""
        values = total.compute(self.reference, self.real_features(batch_size))
        return {**values, **self.heldout_fid(total)}

    def heldout_fid(self, total: MetricAccumulator) -> dict[str, float]:
        """{"fid_heldout"} of the images seen so far; {} without a second reference."""
        return {} if self.heldout is None else {"fid_heldout": fid(total.feature_statistics, self.heldout)}

    def real_features(self, batch_size: int) -> Tensor | None:
        """float32 [n, D] of the real images, extracted once, shared out over ranks."""
        if self._real_images is not None and self._real_features is None:
            images = self._real_images
            part = MetricAccumulator(self.detector, len(images), (), keep_features=True)
            batches = global_batches(len(images), batch_size)
            for b in deal(len(batches), rank(), world_size()):
                items = np.arange(batches[b].start, batches[b].stop)
                part.update(images.images(items).to(self.device), torch.from_numpy(items))
            self._real_features = part.reduced().features
        return self._real_features

    def __call__(
        self,
        backbone: Backbone,
        seeds: Sequence[int],
        *,
        settings: dict,
        batch_size: int,
        file_order: np.ndarray | None = None,
        **options,
    ) -> dict:
        """Every wanted metric of the images of `seeds`, with what made them. `file_order`: see `MetricAccumulator`;
        `options` go to `evaluate`."""
        began = time.monotonic()
        make = lambda: self.new_accumulator(len(seeds), file_order)  # noqa: E731
        total = evaluate(backbone, seeds, make, settings=settings, batch_size=batch_size, **options)
        return {
            **self.compute(total, batch_size),
            "num_images": len(seeds),
            "seeds": format_seeds(seeds),
            "settings": settings,
            "batch_size": batch_size,
            "reference": self.reference.name,
            "detector": self.detector.name,
            "detector_is_official": self.detector.official,
            "seconds": round(time.monotonic() - began, 2),
            "world_size": world_size(),
            "device": str(self.device),
            "torch": torch.__version__,
        }


def _checked(reference: str | Path | Reference) -> Reference:
    found = reference if isinstance(reference, Reference) else load_reference(fetch(reference))
    _ = found.factor  # a sigma that is no covariance is refused now, not after the sampling
    return found


def evaluate(
    backbone: Backbone,
    seeds: Sequence[int],
    new_accumulator: Callable[[], MetricAccumulator],
    *,
    settings: dict,
    batch_size: int,
    work_dir: str | Path | None = None,
    identity: dict | None = None,
    save_images: str | Path | None = None,
    save_seconds: float = 30.0,
    progress: bool = True,
) -> MetricAccumulator:
    """Sample every seed once (repeats count as often as they stand) and return the statistics, reduced over ranks.

    `settings` go to `backbone.sample`. `work_dir` holds what is done, saved every `save_seconds`, and is emptied at
    the end; `identity` (weights' hash and the like) tells whether what lies there is of this run. `save_images` also
    writes PNGs. Every rank calls it; every rank gets the reduced statistics.
    """
    labels = backbone.assign_labels(seeds, **settings)
    batches = global_batches(len(seeds), batch_size)
    accumulator = new_accumulator()
    store, done = None, []
    if work_dir is not None:
        identity = {"seeds": format_seeds(seeds), "batch_size": batch_size, "settings": settings, **(identity or {})}
        store = _Store(work_dir, identity)
        done = store.resume(accumulator, new_accumulator)
        if done:
            print0(f"continuing: {len(done)} of {len(batches)} batches were done in {store.folder}")
    mine = deal(len(batches), rank(), world_size(), done)
    bar = tqdm(
        total=len(seeds),
        initial=sum(len(batches[b]) for b in done),
        unit="img",
        desc="evaluate",
        disable=not (progress and is_main()),
    )
    finished, saved_at = list(done) if is_main() else [], time.monotonic()
    for number, b in enumerate(mine):
        part = list(batches[b])
        images = backbone.sample([seeds[i] for i in part], None if labels is None else labels[part], **settings)
        accumulator.update(images, torch.tensor(part))
        if save_images is not None:
            names = [image_name(i, None if labels is None else int(labels[i])) for i in part]
            write_images(Path(save_images), names, images)
        finished.append(b)
        left = len(seeds) - bar.n
        bar.update(min(left, len(part) * world_size()) if number < len(mine) - 1 else left)
        if store and time.monotonic() - saved_at >= save_seconds:
            store.save(accumulator, finished)
            saved_at = time.monotonic()
    bar.close()
    total = accumulator.reduced()
    if store:
        store.clear()
    return total


class _Store:
    """What a killed evaluation leaves: one file per rank, with its statistics and the batches in them."""

    def __init__(self, folder: str | Path, identity: dict):
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(folder)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _path(self, number: int) -> Path:
        return self.folder / f"partial-{self.key}-{number:03d}.pt"

    def resume(self, accumulator: MetricAccumulator, new_accumulator: Callable[[], MetricAccumulator]) -> list[int]:
        """Batches done by an earlier run, on every rank; rank 0's accumulator takes their statistics over."""
        done: list[int] = []
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = sorted(self.folder.glob(f"partial-{self.key}-*.pt"))
            for path in paths:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if set(saved["batches"]) <= set(done):  # merged already, by a run that was killed before it unlinked
                    continue
                if set(saved["batches"]) & set(done):
                    raise UserError(f"{path}: counts batches that another file counts too; remove {self.folder}")
                part = new_accumulator()
                part.load_state_dict(saved["statistics"])
                accumulator.merge(part)
                done += saved["batches"]
            if done:
                self.save(accumulator, done)
                for path in paths:
                    if path != self._path(0):
                        path.unlink()
        done = broadcast_object(done)
        barrier()
        return done

    def save(self, accumulator: MetricAccumulator, batches: list[int]) -> None:
        with atomic_path(self._path(rank())) as temporary:
            torch.save({"batches": list(batches), "statistics": accumulator.state_dict()}, temporary)

    def clear(self) -> None:
        barrier()
        if is_main():
            for path in self.folder.glob(f"partial-{self.key}-*.pt"):
                path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        barrier()
