"""One object per evaluation: images go in batch by batch, on any rank, in any order; FID, IS, KID and PRDC come out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_core.distributed import all_reduce_, gather_objects
from neon_files.errors import UserError
from neon_metrics.detector import Detector
from neon_metrics.neighbours import MOST, prdc
from neon_metrics.reference import Reference
from neon_metrics.scores import fid, kid
from neon_metrics.statistics import SEED, FeatureStatistics, InceptionScoreStatistics

METRICS = ("fid", "is", "kid", "prdc")


@dataclasses.dataclass(frozen=True)
class MetricSettings:
    """torch-fidelity's defaults; `nearest_k` is the paper's."""

    is_splits: int = 10
    is_shuffle: bool = True
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    nearest_k: int = 5
    seed: int = SEED


class MetricAccumulator:
    """Statistics of the images 0 .. num_images-1 of a run, each seen once, by one rank or shared out over many.

    Images are not kept. The state holds for FID the running mean and covariance, for IS the sums of the splits, for KID
    and PRDC the features, float32 (`keep_features` keeps them without those two). Order of the calls:
    `update` for every batch, `state_dict` now and then, `reduced` at the end, `compute` on its result.

    `file_order` (see `InceptionScoreStatistics`) matters to IS only. Raises UserError where the images are too few for
    a metric or the detector has no logits for IS, before anything is computed.
    """

    def __init__(
        self,
        detector: Detector,
        num_images: int,
        metrics: Iterable[str] = ("fid", "is"),
        settings: MetricSettings | None = None,
        *,
        file_order: np.ndarray | None = None,
        keep_features: bool = False,
        device: torch.device | str | None = None,
    ):
        settings = settings or MetricSettings()
        selected = frozenset(metrics)
        unknown = selected - set(METRICS)
        if unknown:
            raise UserError(f"unknown metrics {', '.join(sorted(unknown))}; choose from {', '.join(METRICS)}")
        device = torch.device(device if device is not None else getattr(detector, "device", "cpu"))
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        num_classes = getattr(detector, "num_classes", 0)
        if "is" in selected and num_classes == 0:
            raise UserError(f"the Inception Score needs class logits, which the detector {detector.name} does not give")
        check_sizes(selected, num_images, settings, device, "were asked for")
        self.device = device
        self.detector = detector
        self.num_images = num_images
        self.metrics = selected
        self.settings = settings
        self.seen = torch.zeros(num_images, dtype=torch.bool)
        self.feature_statistics = FeatureStatistics(detector.num_features, device) if "fid" in selected else None
        self.inception_score = None
        if "is" in selected:
            self.inception_score = InceptionScoreStatistics(
                num_images,
                num_classes,
                splits=settings.is_splits,
                shuffle=settings.is_shuffle,
                seed=settings.seed,
                file_order=file_order,
                device=device,
            )
        self.features: Tensor | None = None  # [num_images, D], rows that were not seen are 0
        if keep_features or selected & {"kid", "prdc"}:
            self.features = torch.zeros(num_images, detector.num_features)
        order = "" if file_order is None else hashlib.sha256(np.asarray(file_order, np.int64).tobytes()).hexdigest()
        self._file_order_digest = order

    @property
    def signature(self) -> dict[str, Any]:
        """The settings that must agree between accumulators that are merged, reduced or loaded. JSON."""
        return {
            "detector": self.detector.name,
            "num_features": self.detector.num_features,
            "num_images": self.num_images,
            "metrics": sorted(self.metrics),
            "keeps_features": self.features is not None,
            "settings": dataclasses.asdict(self.settings),
            "file_order": self._file_order_digest,
        }

    @property
    def rows(self) -> Tensor:
        """float32 [num_images, D]: the features, 0 of images not seen. ValueError where they are not kept."""
        if self.features is None:
            raise ValueError("this evaluation keeps no features")
        return self.features

    @property
    def num_seen(self) -> int:
        return int(self.seen.sum())

    def update(self, images: Tensor, indices: Tensor | Iterable[int]) -> None:
        """Take in uint8 [B, C, H, W], the images number `indices` [B] of the run.

        ValueError for an index that is out of range or was seen before, and for features that are not finite.
        """
        indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64).cpu()
        if indices.shape != (len(images),):
            raise ValueError(f"{len(images)} images with indices of the shape {tuple(indices.shape)}")
        if len(indices) == 0:
            return
        if indices.min() < 0 or indices.max() >= self.num_images:
            raise ValueError(f"image indices must be 0 .. {self.num_images - 1}")
        if self.seen[indices].any() or len(indices.unique()) < len(indices):
            raise ValueError("an image may be counted only once")
        outputs = self.detector(images)
        features = outputs["features"]
        if features.shape != (len(images), self.detector.num_features) or not torch.isfinite(features).all():
            raise ValueError(f"{self.detector.name} gave features {tuple(features.shape)}, or some that are not finite")
        if self.feature_statistics is not None:
            self.feature_statistics.update(features)
        if self.inception_score is not None:
            self.inception_score.update(outputs["logits"], indices)
        if self.features is not None:
            self.features[indices] = features.detach().float().cpu()
        self.seen[indices] = True

    def merge(self, other: MetricAccumulator) -> None:
        """Take in the images that `other` has seen; ValueError where both saw one, or they differ in any setting."""
        if other.signature != self.signature:
            raise ValueError(f"cannot merge evaluations that differ: {_difference(self.signature, other.signature)}")
        if (self.seen & other.seen).any():
            raise ValueError("cannot merge: some images were seen by both")
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.merge(theirs)
        if self.features is not None and other.features is not None:
            self.features[other.seen] = other.features[other.seen]
        self.seen |= other.seen

    def reduced(self) -> MetricAccumulator:
        """The accumulator over all ranks' images, on every rank; `self` stays one rank's part. All ranks must call."""
        signatures = gather_objects(self.signature)
        if any(signature != self.signature for signature in signatures):
            raise ValueError("the ranks evaluate with different settings")
        counts = all_reduce_(self.seen.to(torch.int64))
        if (counts > 1).any():
            raise ValueError(f"{int((counts > 1).sum())} images were seen by more than one rank")
        total = copy.copy(self)
        total.seen = counts.bool()
        if self.feature_statistics is not None:
            total.feature_statistics = self.feature_statistics.all_reduced()
        if self.inception_score is not None:
            total.inception_score = self.inception_score.all_reduced()
        if self.features is not None:
            rows = total.seen.nonzero().squeeze(1)  # of a growing run, far fewer than all
            total.features = torch.zeros_like(self.features)
            total.features[rows] = all_reduce_(self.features[rows])  # every row is 0 on all ranks but one
        return total

    def grow(self, num_images: int) -> None:
        """Make room for more images of the same run. UserError with IS, whose split depends on their number."""
        if self.inception_score is not None:
            raise UserError("the Inception Score cannot be extended to more images: its split depends on their number")
        if num_images < self.num_images:
            raise ValueError(f"cannot shrink from {self.num_images} to {num_images} images")
        more = num_images - self.num_images
        self.seen = torch.cat([self.seen, torch.zeros(more, dtype=torch.bool)])
        if self.features is not None:
            self.features = torch.cat([self.features, torch.zeros(more, self.features.shape[1])])
        self.num_images = num_images

    def compute(self, reference: Reference | None = None, real_features: Tensor | None = None) -> dict[str, float]:
        """All selected metrics: fid; is_mean, is_std; kid_mean, kid_std; precision, recall, density, coverage.

        FID needs `reference`, KID and PRDC `real_features` [n, D]. Precision and recall count open balls, as the
        paper's prdc. Those from features are computed on the detector's device and shared out over ranks: every rank
        calls it. ValueError while images are missing; BiasedFidWarning where there are too few for FID.
        """
        if not self.seen.all():
            raise ValueError(f"{self.num_images - self.num_seen} of {self.num_images} images are missing")
        if "fid" in self.metrics and reference is None:
            raise ValueError("FID cannot be computed without a reference")
        if self.metrics & {"kid", "prdc"} and real_features is None:
            raise ValueError("KID and PRDC cannot be computed without real_features")
        values: dict[str, float] = {}
        if self.feature_statistics is not None and reference is not None:
            values["fid"] = fid(self.feature_statistics, reference)
        if self.inception_score is not None:
            values["is_mean"], values["is_std"] = self.inception_score.score()
        if self.features is not None and real_features is not None:
            values |= self._compared(self.features, real_features)
        return values

    def _compared(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        """What is computed from the features of both sides: KID, PRDC."""
        values: dict[str, float] = {}
        s, generated, real = self.settings, generated.to(self.device), real.to(self.device)
        if "kid" in self.metrics:
            values["kid_mean"], values["kid_std"] = kid(
                generated=generated, real=real, subsets=s.kid_subsets, subset_size=s.kid_subset_size, seed=s.seed
            )
        if "prdc" in self.metrics:
            scores = prdc(real=real, generated=generated, k=s.nearest_k)
            values["precision"], values["recall"] = scores.precision_strict, scores.recall_strict
            values["density"], values["coverage"] = scores.density, scores.coverage
        return values

    def state_dict(self) -> dict[str, Any]:
        """Tensors, dicts and strings (`torch.load(..., weights_only=True)` reads it back): the images seen so far."""
        state = {"signature": json.dumps(self.signature, sort_keys=True), "seen": self.seen.clone()}
        if self.feature_statistics is not None:
            state["feature_statistics"] = self.feature_statistics.state_dict()
        if self.inception_score is not None:
            state["inception_score"] = self.inception_score.state_dict()
        if self.features is not None:
            state["features"] = self.features[self.seen]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same evaluation. UserError where a setting differs."""
        saved = json.loads(state["signature"])
        if saved != self.signature:
            text = _difference(self.signature, saved)
            raise UserError(f"the saved evaluation is another one ({text}); name another output folder")
        self.seen = state["seen"].clone()
        if self.feature_statistics is not None:
            self.feature_statistics.load_state_dict(state["feature_statistics"])
        if self.inception_score is not None:
            self.inception_score.load_state_dict(state["inception_score"])
        if self.features is not None:
            self.features.zero_()
            self.features[self.seen] = state["features"]

    def _parts(self) -> list:
        return [part for part in (self.feature_statistics, self.inception_score) if part is not None]


def extract_features(detector: Detector, batches: Iterable[Tensor]) -> Tensor:
    """float32 [n, D] on the CPU, from batches of uint8 images [B, C, H, W]."""
    parts = [detector(images)["features"].detach().float().cpu() for images in batches]
    return torch.cat(parts) if parts else torch.zeros(0, detector.num_features)


def check_sizes(
    metrics: Iterable[str], num_images: int, settings: MetricSettings, device: torch.device, where: str
) -> None:
    """UserError where `num_images` are too few for one of `metrics`, or too many to end; `where` ends the sentence."""
    least = {
        "fid": (2, "FID"),
        "is": (settings.is_splits, f"the Inception Score in {settings.is_splits} parts"),
        "kid": (settings.kid_subset_size, f"KID with subsets of {settings.kid_subset_size}"),
        "prdc": (settings.nearest_k + 1, f"precision and recall with k = {settings.nearest_k}"),
    }
    for metric in METRICS:
        count, text = least[metric]
        if metric in metrics and num_images < count:
            raise UserError(f"{text} needs at least {count} images, and {num_images} {where}")
    most = MOST[device.type]
    if "prdc" in metrics and num_images > most:
        raise UserError(
            f"precision and recall compare all pairs of images, at most {most:,} on this device, and {num_images:,} "
            f"{where}; use fewer, or leave prdc out of --metrics"
        )


def _difference(mine: dict, theirs: dict) -> str:
    return ", ".join(f"{k}: {theirs.get(k)!r} instead of {mine[k]!r}" for k in mine if mine[k] != theirs.get(k))
