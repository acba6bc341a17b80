"""The sampling error of an FID: a bootstrap over the global batches of its images."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from neon_core.distributed import cores
from neon_files.progress import progress_bar
from neon_metrics.reference import Reference
from neon_metrics.scores import BiasedFidWarning, fid
from neon_metrics.statistics import FeatureStatistics

MOST_RESAMPLES = 10_000  # some hours on eight cores; the standard error is then known to 0.7 %
MOST_WORKERS = 8  # of the bootstrap: each holds a few covariances
MAX_BLOCKS = 40  # of whole batches: each holds a covariance, 33 MB with 2048 features


def block_statistics(features: Tensor, batch_size: int) -> list[FeatureStatistics]:
    """float32 [n, D], in the order of the seeds -> statistics of up to 40 blocks of whole global batches."""
    num_batches = -(-len(features) // batch_size)
    blocks = np.array_split(np.arange(num_batches), min(num_batches, MAX_BLOCKS))
    return [
        FeatureStatistics(features.shape[1]).update(features[part[0] * batch_size : (part[-1] + 1) * batch_size])
        for part in blocks
    ]


def bootstrap_fids(
    blocks: list[FeatureStatistics], reference: Reference, *, resamples: int = 30, seed: int = 0
) -> np.ndarray:
    """float64 [resamples]: the FID of blocks drawn with replacement. One seed draws the same blocks for every model
    whose images share their seeds, so differences of two results are paired. Computed on all cores of this process,
    which its linear algebra leaves free.

    Repeated images make every resample's FID too high, so its mean is not used; its spread is the standard error.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=resamples)
    _ = reference.factor  # once, before the threads ask for it

    def resampled(drawn: list[int]) -> float:
        return fid(_drawn(blocks, drawn), reference)

    workers = max(1, min(MOST_WORKERS, cores() // int(os.environ.get("OMP_NUM_THREADS") or cores())))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", BiasedFidWarning)  # given once already, for the FID itself
        return np.array(list(progress_bar(pool.map(resampled, counts.tolist()), total=resamples, desc="bootstrap")))


def _drawn(blocks: list[FeatureStatistics], counts: list[int]) -> FeatureStatistics:
    """The statistics of each block's images, counted so many times."""
    images = torch.tensor([n * block.count for n, block in zip(counts, blocks, strict=True)], dtype=torch.float64)
    means = torch.stack([block.mean for block in blocks])  # [blocks, D]
    drawn = FeatureStatistics(blocks[0].num_features)
    drawn.count = int(images.sum())
    drawn.mean = images @ means / drawn.count
    deviations = (means - drawn.mean) * images[:, None].sqrt()
    drawn.scatter = deviations.T @ deviations
    for n, block in zip(counts, blocks, strict=True):
        if n:
            drawn.scatter.add_(block.scatter, alpha=n)
    return drawn


def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    """{"value", "standard_error", "low", "high"}: 95 %, symmetric about the value that was measured."""
    error = float(np.std(resampled, ddof=1))
    return {"value": value, "standard_error": error, "low": value - 1.96 * error, "high": value + 1.96 * error}
