"""Metrics: FID of infinitely many images, kernels by name, and the covariance of EDM's sweep scripts."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from neon_files.errors import UserError
from neon_metrics.reference import Reference
from neon_metrics.scores import Kernel, fid_from_features, polynomial_kernel, rbf_kernel
from neon_metrics.statistics import FeatureStatistics


def fid_infinity_fit(num_images, fids) -> tuple[float, float]:
    """(a, b) of the least-squares line FID = a + b / n; a is the extrapolated value. Chong and Forsyth 2020.

    ValueError for fewer than two different n.
    """
    x, y = 1.0 / np.asarray(num_images, dtype=np.float64), np.asarray(fids, dtype=np.float64)
    if x.shape != y.shape or len(np.unique(x)) < 2:
        raise ValueError("FID infinity needs the FID at two or more different numbers of images")
    slope = float((x - x.mean()) @ (y - y.mean()) / np.sum((x - x.mean()) ** 2))
    return float(y.mean() - slope * x.mean()), slope


def fid_infinity(
    features: Tensor, reference: Reference, *, points: int = 15, min_images: int = 5000, seed: int = 0
) -> float:
    """FID without the bias of finitely many images: the fit through `points` random subsets of `min_images` .. n."""
    count = len(features)
    if count <= min_images:
        raise UserError(f"FID infinity takes subsets of {min_images} images and more, and there are {count} images")
    rng = np.random.default_rng(seed)
    sizes = np.linspace(min_images, count, points).round().astype(int)
    fids = [fid_from_features(features[torch.from_numpy(rng.permutation(count)[:n])], reference) for n in sizes]
    return fid_infinity_fit(sizes, fids)[0]


def kernel_by_name(name: str, **settings) -> Kernel:
    """The kernel "poly" (degree, gamma, coef0) or "rbf" (sigma) with other settings than the default ones."""
    kernels = {"poly": polynomial_kernel, "rbf": rbf_kernel}
    if name not in kernels:
        raise UserError(f"kernel {name!r} is unknown; choose from {', '.join(kernels)}")
    return partial(kernels[name], **settings)


def edm_sweep_covariance(statistics: FeatureStatistics) -> Tensor:
    """sum x x^T / (n - 1) - mu mu^T: what EDM's sweep scripts take for the covariance; too large by mu mu^T / (n - 1).

    Only for comparing with numbers of those scripts.
    """
    return statistics.covariance() + torch.outer(statistics.mean, statistics.mean) / (statistics.count - 1)
