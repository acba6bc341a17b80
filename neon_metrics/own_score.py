"""A score in place of a distance to reference statistics: any function of a set of images, lower is better.

The sampled numbers themselves are kept as features, so that more images can be added to a point that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator

BLOCKS = 8  # of images, from whose scores the standard error follows


@dataclass(frozen=True)
class ScoreName:
    """Stands where an evaluation names its reference."""

    name: str
    digest: str  # changes with the score


class ScoreEvaluator(Evaluator):
    """An `Evaluator` whose "fid" is `score(images)`: images [n, *shape] of `dtype` on the CPU -> a number.

    `digest` is to change with the function: points of another one are not taken over.
    """

    def __init__(
        self,
        score: Callable[[Tensor], float],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device,
        digest: str,
    ):
        self.score, self.shape, self.dtype, self.device = score, tuple(shape), dtype, device
        self.detector = score_detector(self.shape)
        self.reference = ScoreName("score", digest)  # type: ignore[assignment]  # there is nothing to compare with
        self.heldout, self.metrics = None, ()
        self._real_images = self._real_features = self._kept = None

    def distance(self, total: MetricAccumulator) -> dict[str, float]:
        return {"fid": self.of(total.rows[total.seen])}

    def compute(self, total: MetricAccumulator, batch_size: int) -> dict[str, float]:
        return self.distance(total)

    def of(self, rows: Tensor) -> float:
        """The score of the images in these rows of features [n, D]; a NaN is the caller's to refuse."""
        return float(self.score(rows.reshape(-1, *self.shape).to(self.dtype)))

    def of_blocks(self, total: MetricAccumulator) -> np.ndarray:
        """[BLOCKS] numbers whose standard deviation is the standard error of the mean of the blocks' scores."""
        parts = np.array([self.of(rows) for rows in total.rows.tensor_split(min(BLOCKS, len(total.rows) // 2))])
        return parts / math.sqrt(len(parts))


def score_detector(shape: Sequence[int]) -> FunctionDetector:
    """The numbers of the images as their features, float32 [B, D]."""
    return FunctionDetector("the score", math.prod(shape), lambda images: images.flatten(1).float())
