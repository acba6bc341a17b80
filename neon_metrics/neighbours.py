"""Precision, recall, density and coverage: which points lie inside the nearest-neighbour balls of the other set.

Kynkaanniemi et al. 2019 (precision, recall), Naeem et al. 2020 (density, coverage). The counts are exact: products of
matrices give distances fast but with rounding, so every pair that this rounding could put on the wrong side of a ball,
exact copies and ties among them, is decided by the distance from differences. So they do not depend on the device, nor
on the ranks that the rows are shared out over. Shapes: n points, D features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neon_core.distributed import all_reduce_, is_main, rank, world_size
from neon_files.errors import UserError
from neon_files.progress import progress_bar

EPS = float(np.finfo(np.float64).eps)
MANY = 20  # pieces, from which on their progress is shown
SPARE = 4  # neighbours considered beyond the k nearest, against ties
CHUNK_ELEMENTS = 1 << 24  # of one block of distances, float64
MOST = {"cpu": 100_000, "cuda": 300_000}  # points of a set, with Inception's features: an hour of one core or slow GPU


@dataclass(frozen=True)
class NeighbourScores:
    """Closed balls (<=, torch-fidelity, ADM) for precision, recall, f_score; open ones (<, prdc) for the others."""

    precision: float  # share of generated points inside some real ball
    recall: float  # share of real points inside some generated ball
    f_score: float  # harmonic mean of the two
    precision_strict: float  # the paper's precision and recall
    recall_strict: float
    density: float  # mean number of real balls around a generated point, over k
    coverage: float  # share of real points with a generated point inside their ball
    radii_real: Tensor  # [n_real]
    radii_generated: Tensor  # [n_generated]


def prdc(*, real: Tensor, generated: Tensor, k: int = 5) -> NeighbourScores:
    """Scores of features [n_generated, D] against [n_real, D]; a ball reaches to its centre's k-th nearest other point.

    Arguments by name only: packages disagree on the order of the two sets, which swaps precision and recall.
    The paper uses k = 5, torch-fidelity and ADM k = 3. The rows are shared out over ranks: every rank calls it with the
    same features, on its device, and gets the same. UserError where a set has no more than k points, or more than MOST.
    """
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= k:
            raise UserError(f"precision and recall with k = {k} need more than {k} images; {name} has {len(features)}")
        if len(features) > MOST[features.device.type]:
            raise UserError(
                f"precision and recall compare all pairs of images, and {name} has {len(features):,}; give at most "
                f"{MOST[features.device.type]:,}"
            )
    pair = _Pair(generated, real)
    radii_generated, radii_real = radii(generated, k), radii(real, k)
    inside_real = {kind: pair.zeros(len(generated)) for kind in ("closed", "open")}  # is it inside some real ball?
    reached = {kind: pair.zeros(len(real)) for kind in ("closed", "open")}  # is it inside some generated ball?
    balls, covered = pair.zeros(1), pair.zeros(len(real))
    for rows in pair.my_chunks("precision and recall"):
        squares = pair.squares(rows)
        around_real = pair.compare(squares, rows, radii_real[None])
        around_generated = pair.compare(squares, rows, radii_generated[rows, None])
        for kind in ("closed", "open"):
            inside_real[kind][rows] = around_real[kind].any(dim=1).long()
            reached[kind] |= around_generated[kind].any(dim=0).long()
        balls += around_real["open"].sum()
        covered |= around_real["open"].any(dim=0).long()
    precision = {kind: _share(flags) for kind, flags in inside_real.items()}
    recall = {kind: _share(flags) for kind, flags in reached.items()}
    p, r = precision["closed"], recall["closed"]
    return NeighbourScores(
        precision=p,
        recall=r,
        f_score=2 * p * r / max(1e-5, p + r),
        precision_strict=precision["open"],
        recall_strict=recall["open"],
        density=int(all_reduce_(balls)) / (k * len(generated)),
        coverage=_share(covered),
        radii_real=radii_real,
        radii_generated=radii_generated,
    )


def radii(features: Tensor, k: int) -> Tensor:
    """float64 [n]: Euclidean distance of each of [n, D] to its k-th nearest other point (copies are other points).
    Shared out over ranks, as `prdc`."""
    pair = _Pair(features, features)
    n = len(features)
    candidates = min(k + SPARE, n - 1)
    found = torch.zeros(n, dtype=torch.float64, device=pair.device)
    for rows in pair.my_chunks("neighbours"):
        squares = pair.squares(rows)
        me = torch.arange(len(rows), device=pair.device)
        squares[me, rows] = torch.inf
        nearest, columns = squares.topk(candidates, largest=False)  # [c, candidates]
        exact = pair.exact(rows[:, None].expand_as(columns), columns)
        radius = exact.kthvalue(k, dim=1).values
        unsure = (nearest[:, -1] - 2 * pair.margin <= radius.square()) & (candidates < n - 1)
        for i in unsure.nonzero()[:, 0].tolist():  # more ties than spare candidates
            others = torch.arange(n, device=pair.device)
            others = others[others != rows[i]]
            radius[i] = pair.exact(rows[i].expand_as(others), others).kthvalue(k).values
        found[rows] = radius
    return all_reduce_(found)  # every row is 0 on all ranks but one


class _Pair:
    """Distances between the rows of two sets: fast ones with a bounded error, and exact ones for single pairs."""

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a.detach().double(), b.detach().double().to(a.device)
        self.device = self.a.device
        # Rounded to float32, so that subtracting it from float32 features is exact.
        centre = self.b.mean(dim=0).float().double()
        self.centred_a, self.centred_b = self.a - centre, self.b - centre
        self.norms_a, self.norms_b = self.centred_a.square().sum(dim=1), self.centred_b.square().sum(dim=1)
        width = a.shape[1]
        largest = float(max(self.norms_a.max(), self.norms_b.max()))
        offset = float(max(self.a.abs().max(), self.b.abs().max()))
        self.margin = 4 * (width + 8) * EPS * largest + 8 * EPS * offset * (width * largest) ** 0.5

    def my_chunks(self, work: str) -> Iterable[Tensor]:
        """Row numbers of `a` in pieces: this rank's share of them. `work` stands before the progress of many."""
        pieces = torch.arange(len(self.a), device=self.device).split(max(1, CHUNK_ELEMENTS // len(self.b)))
        mine = pieces[rank() :: world_size()]
        return progress_bar(mine, desc=work, unit="piece", disable=not is_main() or len(mine) < MANY)

    def zeros(self, count: int) -> Tensor:
        """int64 [count], which ranks can add up."""
        return torch.zeros(count, dtype=torch.int64, device=self.device)

    def squares(self, rows: Tensor) -> Tensor:
        """Squared distances of these rows of `a` to all of `b`, [c, n_b], right to `margin`."""
        products = self.centred_a[rows] @ self.centred_b.T
        return products.mul_(-2).add_(self.norms_a[rows, None]).add_(self.norms_b)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Distance of each single pair, from differences; the shape of `columns`."""
        size = max(1, CHUNK_ELEMENTS // 4 // self.a.shape[1])
        pairs = zip(rows.flatten().split(size), columns.flatten().split(size), strict=True)
        parts = [
            torch.cdist(self.a[i, None], self.b[j, None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0, 0]
            for i, j in pairs
        ]
        return torch.cat(parts).view(columns.shape)

    def compare(self, squares: Tensor, rows: Tensor, radius: Tensor) -> dict[str, Tensor]:
        """Which distances are below the radius ("open") or not above it ("closed"): two bool [c, n_b].

        `radius` is [1, n_b] or [c, 1].
        """
        limit = radius.square()
        inside = squares < limit
        i, j = ((squares - limit).abs_() <= self.margin).nonzero(as_tuple=True)
        closed = inside.clone()
        if len(i):
            exact, limits = self.exact(rows[i], j), radius.expand_as(squares)[i, j]
            inside[i, j], closed[i, j] = exact < limits, exact <= limits
        return {"open": inside, "closed": closed}


def _share(flags: Tensor) -> float:
    """Of the points whose flag is set on any rank."""
    return float((all_reduce_(flags) > 0).double().mean())
