"""FID, its extrapolation to infinitely many images, Inception Score and KID, each from features or statistics.

All arithmetic is float64. Shapes: n images, D features, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neon_core.distributed import all_reduce_, rank, world_size
from neon_files.errors import UserError
from neon_metrics.covariance import EPS, psd_factor
from neon_metrics.reference import Reference
from neon_metrics.statistics import SEED, FeatureStatistics, InceptionScoreStatistics


class BiasedFidWarning(UserWarning):
    """FID from so few images that the covariance is singular: its bias, which falls like 1 / n, is large."""


# --------------------------------------------------------------------------------------------------- Frechet distance


class FrechetTerms(NamedTuple):
    """The parts of |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)."""

    mean_term: float
    trace_sum: float
    trace_sqrt: float

    @property
    def distance(self) -> float:
        """As computed: rounding may leave it slightly below 0 for equal statistics."""
        return self.mean_term + self.trace_sum - 2 * self.trace_sqrt


def trace_sqrt_product(factor1: np.ndarray, factor2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) = sum of the singular values of L1^T L2, for S1 = L1 L1^T and S2 = L2 L2^T; [D, r1] and [D, r2].

    Large matrices go through the eigenvalues of the Gram matrix, twice as fast, unless the digits lost by squaring
    could reach 1e-9 of the result.
    """
    product = factor1.T @ factor2 if factor1.shape[1] <= factor2.shape[1] else factor2.T @ factor1
    if product.size == 0:
        return 0.0
    if len(product) > 512:
        squares = np.maximum(np.linalg.eigvalsh(product @ product.T), 0.0)
        noise = EPS * squares[-1]
        possible_error = np.sum(noise / np.sqrt(np.maximum(squares, max(noise, np.finfo(np.float64).tiny))))
        total = np.sum(np.sqrt(squares))
        if possible_error <= 1e-9 * total:
            return float(total)
    return float(np.sum(np.linalg.svd(product, compute_uv=False)))


def frechet_terms(mu1, sigma1, mu2, sigma2) -> FrechetTerms:
    """Of two Gaussians given as arrays or tensors of any float type: mu [D], sigma [D, D]. ValueError if not finite."""
    mu1, sigma1, mu2, sigma2 = (_float64(a) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1),) * 2:
        raise ValueError(f"shapes differ: mu {mu1.shape} {mu2.shape}, sigma {sigma1.shape} {sigma2.shape}")
    return _terms(mu1, np.trace(sigma1), psd_factor(sigma1), mu2, np.trace(sigma2), psd_factor(sigma2))


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), Dowson and Landau 1982. As `frechet_terms`."""
    return frechet_terms(mu1, sigma1, mu2, sigma2).distance


def fid(statistics: FeatureStatistics, reference: Reference) -> float:
    """Frechet distance of the images seen by `statistics` to the reference, Heusel et al. 2017.

    UserError for fewer than 2 images or another number of features; BiasedFidWarning where n <= D.
    """
    count = statistics.count
    sigma = _float64(statistics.covariance())
    _check_fid(count, statistics.num_features, reference)
    factor = psd_factor(sigma, max_rank=count - 1)
    return _to_reference(_float64(statistics.mean), np.trace(sigma), factor, reference)


def fid_from_features(features: Tensor | np.ndarray, reference: Reference) -> float:
    """`fid` of features [n, D]. With n <= D the centred features are their own factor: no covariance is formed."""
    features = torch.as_tensor(features)
    count, num_features = features.shape
    if count > num_features:
        return fid(FeatureStatistics(num_features, features.device).update(features), reference)
    _check_fid(count, num_features, reference)
    x = _float64(features)
    factor = (x - x.mean(axis=0)).T / np.sqrt(count - 1)  # [D, n]
    return _to_reference(x.mean(axis=0), np.sum(factor * factor), factor, reference)


def _check_fid(count: int, num_features: int, reference: Reference) -> None:
    if num_features != len(reference.mu):
        raise UserError(f"{reference.name}: made from {len(reference.mu)} features, the detector gives {num_features}")
    if count < 2:
        raise UserError(f"FID needs at least 2 images, and there are {count}")
    if count <= num_features:
        text = f"FID from {count} images with {num_features} features: the covariance is singular and FID far too high"
        warnings.warn(text, BiasedFidWarning, stacklevel=3)


def _to_reference(mu: np.ndarray, trace: float, factor: np.ndarray, reference: Reference) -> float:
    return _terms(mu, trace, factor, reference.mu, np.trace(reference.sigma), reference.factor).distance


def _terms(mu1, trace1, factor1, mu2, trace2, factor2) -> FrechetTerms:
    difference = mu1 - mu2
    return FrechetTerms(
        mean_term=float(difference @ difference),
        trace_sum=float(trace1 + trace2),
        trace_sqrt=trace_sqrt_product(factor1, factor2),
    )


def _float64(a) -> np.ndarray:
    a = np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a, dtype=np.float64)
    if not np.isfinite(a).all():
        raise ValueError("features or statistics are not finite")
    return a


# --------------------------------------------------------------------------------------- FID at infinitely many images


# ---------------------------------------------------------------------------------------------------- Inception Score


def inception_score(logits: Tensor, *, splits: int = 10, shuffle: bool = True, seed: int = SEED) -> tuple[float, float]:
    """(mean, population standard deviation over splits) of logits [n, K] in file order. UserError if n < splits."""
    statistics = InceptionScoreStatistics(*logits.shape, splits=splits, shuffle=shuffle, seed=seed)
    return statistics.update(logits, torch.arange(len(logits))).score()


# ----------------------------------------------------------------------------------------------------------------- KID

Kernel = Callable[[Tensor, Tensor], Tensor]  # [a, D], [b, D] -> [a, b]


def polynomial_kernel(
    x: Tensor, y: Tensor, *, degree: int = 3, gamma: float | None = None, coef0: float = 1.0
) -> Tensor:
    """(gamma x.y + coef0)^degree; gamma is 1 / D by default."""
    gamma = 1.0 / x.shape[1] if gamma is None else gamma
    return (gamma * (x @ y.T) + coef0) ** degree


def rbf_kernel(x: Tensor, y: Tensor, *, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    centre = y.mean(dim=0)  # distances do not change, and the products lose no digits to a common offset
    x, y = x - centre, y - centre
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * (x @ y.T)
    return torch.exp(squares.clamp_min(0) / (-2 * sigma**2))


def mmd2(x: Tensor, y: Tensor, kernel: Kernel = polynomial_kernel) -> float:
    """Unbiased squared maximum mean discrepancy of [n1, D] and [n2, D], Gretton et al. 2012, eq. 3. May be negative."""
    x, y = x.double(), y.double()
    n1, n2 = len(x), len(y)
    if min(n1, n2) < 2:
        raise UserError(f"MMD needs at least 2 samples of each set, and there are {n1} and {n2}")
    within = sum(_kernel_sum(z, z, kernel, diagonal=False) / (len(z) * (len(z) - 1)) for z in (x, y))
    return within - 2 * _kernel_sum(x, y, kernel) / (n1 * n2)


def _kernel_sum(x: Tensor, y: Tensor, kernel: Kernel, diagonal: bool = True, chunk: int = 2048) -> float:
    total = 0.0
    for start in range(0, len(x), chunk):
        block = kernel(x[start : start + chunk], y)  # [<= chunk, len(y)]
        total += float(block.sum())
        if not diagonal:
            total -= float(block.diagonal(offset=start).sum())
    return total


def kid(
    *,
    generated: Tensor,
    real: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    kernel: Kernel = polynomial_kernel,
    seed: int = SEED,
) -> tuple[float, float]:
    """(mean, population standard deviation) of `mmd2` over random subsets of features [n1, D] and [n2, D].

    Binkowski et al. 2018, with torch-fidelity's draws: per subset first of the generated, then of the real set.
    Unbiased at any n, so it may be negative. The subsets are shared out over ranks: every rank calls it with the same
    features and gets the same. UserError where a set is smaller than a subset.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < subset_size:
            raise UserError(f"KID takes subsets of {subset_size} images, and the {name} set has {len(features)}")
    rng = np.random.RandomState(seed)
    found = torch.zeros(subsets, dtype=torch.float64, device=generated.device)
    for number in range(subsets):
        drawn = [torch.from_numpy(rng.choice(len(z), subset_size, replace=False)) for z in (generated, real)]
        if number % world_size() == rank():
            found[number] = mmd2(generated[drawn[0].to(generated.device)], real[drawn[1].to(real.device)], kernel)
    values = all_reduce_(found).cpu().numpy()  # each is 0 on all ranks but one
    return float(np.mean(values)), float(np.std(values))
