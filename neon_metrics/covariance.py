"""A factor of a covariance matrix, which Frechet distances are computed from."""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from neon_files.errors import UserError

EPS = float(np.finfo(np.float64).eps)


def psd_factor(sigma: np.ndarray, max_rank: int | None = None) -> np.ndarray:
    """L [D, r] with L L^T = sigma [D, D], r its numerical rank (or `max_rank`, where that is smaller).

    Pivoted Cholesky stops at the rank, so that null directions add no noise of the size sqrt(eps). A matrix that is
    not positive semi-definite by a little (statistics stored in float32) goes through its eigenvalues, negative ones
    dropped. UserError where it is so by much: no covariance is.
    """
    size, largest = len(sigma), float(np.max(np.diag(sigma), initial=0.0))
    cholesky, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)  # stops at pivots below D eps largest
    order = pivots - 1
    rank = min(rank, size if max_rank is None else max_rank)
    lower = np.tril(cholesky)[:, :rank]
    rest = order[rank:]
    left_over = sigma[np.ix_(rest, rest)] - lower[rank:] @ lower[rank:].T
    if np.max(np.abs(left_over), initial=0.0) <= 16 * size * EPS * largest:
        factor = np.empty_like(lower)
        factor[order] = lower
        return factor
    values, vectors = np.linalg.eigh(sigma)
    if values[0] < -1e-3 * max(values[-1], 0.0) or values[-1] <= 0:
        raise UserError(f"sigma is not a covariance: its eigenvalues run from {values[0]:.3g} to {values[-1]:.3g}")
    keep = np.flatnonzero(values > size * EPS * values[-1])
    keep = keep if max_rank is None else keep[max(len(keep) - max_rank, 0) :]
    return vectors[:, keep] * np.sqrt(values[keep])
