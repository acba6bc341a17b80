"""A search for (snapshot, w, guidance) that needs a tenth of the images of a grid.

What makes it cheap: FID is locally quadratic in (w, guidance), so six points and a few refinements find the valley; all
points share their seeds, so most of the noise and of the finite-sample bias is the same at every point and few images
rank them; only the two best are measured with many. The length of the step, w |theta_syn - theta_base|, changes little
from snapshot to snapshot, so one snapshot's optimum predicts the next one's. `docs/search.md` has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from neon_files.errors import UserError

Measure = Callable[[str, float, float | None, int], float]  # snapshot, w, guidance, images -> FID

# Set on the simulated surfaces of benchmarks/search.py, seeds 0-49; its tables are of other seeds.
RADIUS, RADIUS_NEXT = 1.25, 0.9  # of the trust region at the start, in first steps: first snapshot, further ones
GROW, SHRINK = 1.4, 0.6  # after a step that gained most of the predicted gain, after one that gained nothing
MIN_DISTANCE = 0.2  # first steps between two settings, at least
# Priors of the fit, in units of the median rise above the lowest point:
NOISE, MISFIT = 0.02, 0.15  # error of a point at the minimum; addition far above it, as a fraction of the height there
ROUND, DIAGONAL = 0.75, 0.7  # curvature, of the points' own mean rise; cross term (0: none, 1: a level valley)
BENT, TILTED = 3.0, 10.0  # widths of the priors: second derivatives, and a snapshot's slope against another's


@dataclass(frozen=True)
class Axis:
    """One coordinate of the search: where it may go, where it starts, and the first step to both sides."""

    low: float
    high: float
    start: float
    step: float

    def clip(self, value: float) -> float:
        return float(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Point:
    """One measured setting. `u` is w in units of the reference snapshot's step length."""

    snapshot: str
    w: float
    guidance: float | None
    u: float
    images: int
    fid: float


@dataclass(frozen=True)
class Budget:
    """The cost of a search: settings per snapshot, images while ranking, and for the last two."""

    settings: int = 10
    settings_next: int = 6  # of each further snapshot, guided by the first; the best snapshot gets all `settings`
    settings_one_axis: int = 5  # these two instead, where there is no guidance
    settings_next_one_axis: int = 3
    ranking_images: int = 5_000
    deciding_images: int = 10_000


@dataclass
class Found:
    """The best point, everything measured on the way, and the images that were sampled for it."""

    best: Point
    points: list[Point] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Each setting's statistics are extended, not recomputed: its largest count is its cost."""
        cost: dict[tuple, int] = {}
        for p in self.points:
            key = (p.snapshot if p.w else "base", p.w, p.guidance)
            cost[key] = max(cost.get(key, 0), p.images)
        return sum(cost.values())


def search(
    measure: Measure,
    snapshots: Mapping[str, float],
    w: Axis,
    guidance: Axis | None,
    budget: Budget | None = None,
) -> Found:
    """Find the setting with the lowest FID. `snapshots`: name -> |theta_syn - theta_base|, in the order to try them.

    The first snapshot gets the whole six-point design (three points without guidance) and trust-region steps on the
    refitted quadratic; each further one starts at the predicted optimum with the shape already fitted, and the best of
    them gets as many settings as the first. Then the two best settings of all are measured with `deciding_images`, and
    the lower wins.
    """
    budget = budget or Budget()
    names = list(snapshots)
    axes = [w] + ([guidance] if guidance else [])
    settings = budget.settings if guidance else budget.settings_one_axis
    settings_next = budget.settings_next if guidance else budget.settings_next_one_axis
    points: list[Point] = []
    radius: dict[str, float] = {}

    def at(name: str, x: np.ndarray) -> Point:
        u = w.clip(float(x[0]))
        g = guidance.clip(float(x[1])) if guidance else None
        own_w = round(u * snapshots[names[0]] / snapshots[name], 6)
        point = Point(name, own_w, g, u, budget.ranking_images, measure(name, own_w, g, budget.ranking_images))
        points.append(point)
        return point

    def refine(name: str, total: int) -> None:
        """Trust-region steps, until the snapshot has `total` settings."""
        measured = [p for p in points if p.snapshot == name]
        others = [p for p in points if p.snapshot != name]
        while len(measured) < total:
            x, predicted = next_point(measured, axes, radius[name], others)
            if x is None:
                break
            lowest = min(p.fid for p in measured)
            measured.append(at(name, x))
            gained = lowest - measured[-1].fid
            if gained <= 0:
                radius[name] *= SHRINK
            elif gained > 0.5 * predicted:
                radius[name] *= GROW

    for name in names:
        if not _any_finite(points):
            radius[name] = RADIUS
            star = [at(name, x) for x in first_design(axes)[:settings]]
            if not _any_finite(star):  # a broken snapshot: the next one shows the way
                continue
            if guidance and len(star) < settings:
                at(name, corner(star, axes))
            refine(name, settings)
        else:
            radius[name] = RADIUS_NEXT
            at(name, _coordinates(ranked(points, axes)[:1], axes)[0])
            refine(name, settings_next)
    if not _any_finite(points):
        raise UserError("no setting of the search gave finite images; check the snapshots, or search smaller w")
    refine(ranked(points, axes)[0].snapshot, settings)

    many = budget.deciding_images
    finalists = ranked(points, axes)[:2]
    decided = [replace(p, images=many, fid=measure(p.snapshot, p.w, p.guidance, many)) for p in finalists]
    if not _any_finite(decided):
        raise UserError("the best settings of the search gave images that are not finite; search smaller w")
    return Found(min(decided, key=lambda p: p.fid), points + decided)


def first_design(axes: Sequence[Axis]) -> list[np.ndarray]:
    """The start and a step to both sides of each axis; two steps to one side where the box ends at the other."""
    start = np.array([a.start for a in axes])
    design = [start]
    for i, axis in enumerate(axes):
        for sign in (1, -1):
            x = start.copy()
            x[i] = axis.clip(axis.start + sign * axis.step)
            if abs(x[i] - axis.start) < MIN_DISTANCE * axis.step:
                x[i] = axis.clip(axis.start - 2 * sign * axis.step)
            design.append(x)
    return design


def corner(star: Sequence[Point], axes: Sequence[Axis]) -> np.ndarray:
    """The sixth point, which a quadratic needs for its cross term: a step to the lower side of both axes at once."""
    x = _coordinates(star, axes)
    return np.array([x[min(pair, key=lambda k: star[k].fid), i] for i, pair in enumerate([(1, 2), (3, 4)])])


def next_point(
    measured: Sequence[Point], axes: Sequence[Axis], radius: float, borrowed: Sequence[Point] = ()
) -> tuple[np.ndarray | None, float]:
    """Where the fitted quadratic is lowest within `radius` first steps of the best point, and the gain it promises.

    The fit is minimised over a fine grid of the trust region, so an indefinite Hessian leads to the region's rim, not
    to infinity. `borrowed` points of other snapshots lend their shape. None where every place of the region has been
    measured.
    """
    steps = np.array([a.step for a in axes])
    x = _coordinates(measured, axes) / steps
    fitted, coefficients = _fit(measured, axes, borrowed)
    best, origin = int(np.argmin(fitted)), x[np.argmin([p.fid for p in measured])]
    side = np.linspace(-radius, radius, 61)
    grid = np.stack(np.meshgrid(*[side] * len(axes), indexing="ij"), -1).reshape(-1, len(axes))
    grid = grid[np.linalg.norm(grid, axis=1) <= radius] + x[best]
    inside = np.all([(a.low <= q * a.step) & (q * a.step <= a.high) for a, q in zip(axes, grid.T, strict=True)], axis=0)
    nearest = np.min(np.linalg.norm(grid[:, None] - x[None], axis=-1), axis=1)
    grid = grid[inside & (nearest > min(MIN_DISTANCE, 0.5 * radius))]
    if not len(grid):
        return None, 0.0
    values = quadratic_features(grid - origin) @ coefficients
    return grid[np.argmin(values)] * steps, float(fitted[best] - values.min())


def ranked(points: Sequence[Point], axes: Sequence[Axis]) -> list[Point]:
    """The settings in the order of their estimated FID: the mean of the measured one, which has noise, and the fitted
    one, which is wrong far above the minimum. A setting that was measured twice is there once."""
    estimates = {}
    for name in dict.fromkeys(p.snapshot for p in points):
        measured = [p for p in points if p.snapshot == name]
        fitted, _ = _fit(measured, axes, [p for p in points if p.snapshot != name])
        for p, value in zip(measured, fitted, strict=True):
            estimates[p.snapshot if p.w else "base", p.w, p.guidance] = ((p.fid + value) / 2, p)
    return [p for _, p in sorted(estimates.values(), key=lambda pair: pair[0])]


def _fit(measured: Sequence[Point], axes: Sequence[Axis], borrowed: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Fitted FIDs of the `measured` points, and the coefficients, in first steps from the lowest of them."""
    together = [*measured, *(p for p in borrowed if math.isfinite(p.fid))]
    x = _coordinates(together, axes) / np.array([a.step for a in axes])
    x = x - x[np.argmin([p.fid for p in measured])]
    coefficients = fit_quadratic(x, _walls(together), [p.snapshot for p in together])
    return quadratic_features(x[: len(measured)]) @ coefficients, coefficients


def _any_finite(points: Sequence[Point]) -> bool:
    return any(math.isfinite(p.fid) for p in points)


def _walls(points: Sequence[Point]) -> np.ndarray:
    """The FIDs, [n], not all of them infinite; such a one (of images that were not finite) counts as a wall twice as
    high as the others'."""
    fids = np.array([p.fid for p in points])
    finite = fids[np.isfinite(fids)]
    lowest, highest = finite.min(), finite.max()
    return np.where(np.isfinite(fids), fids, highest + max(highest - lowest, 0.1 * abs(highest), 1e-6))


def fit_quadratic(x: np.ndarray, y: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """Coefficients of 1, x_i, x_i^2, x_i x_j (see `quadratic_features`) for the first group. x: [n, d], y: [n].

    Least squares with a prior on the second derivatives: a bowl as steep as the points' own rise, whose valley runs
    along the diagonal. The prior decides where the points do not. The higher above the lowest, the less a point counts,
    since the surface is quadratic only near its floor. Groups share the second derivatives; constant and slope are
    separate.
    """
    groups = list(groups or [""] * len(y))
    (n, d), others = x.shape, [g for g in dict.fromkeys(groups) if g != groups[0]]
    lowest = {g: min(v for v, h in zip(y, groups, strict=True) if h == g) for g in groups}
    above = y - np.array([lowest[g] for g in groups])
    scale = max(float(np.median(above)), 1e-6)
    rise = float(np.median(above / np.maximum((x**2).sum(1), 0.25))) / scale

    features = quadratic_features(x)
    member = np.array([[float(g == other) for other in others] for g in groups]).reshape(n, -1)
    columns = np.concatenate([features, member, *(member * x[:, i : i + 1] for i in range(d))], 1)
    prior, width = np.zeros(columns.shape[1]), np.full(columns.shape[1], np.inf)
    second = slice(1 + d, features.shape[1])
    prior[second] = ROUND * rise * np.array([1.0] * d + [-2 * DIAGONAL] * (d * (d - 1) // 2))
    width[second] = BENT
    width[features.shape[1] + len(others) :] = TILTED
    error = np.hypot(NOISE, MISFIT * above / scale)
    a = np.concatenate([columns / error[:, None], np.diag(1 / width)])
    b = np.concatenate([y / scale / error, prior / width])
    return np.linalg.lstsq(a, b, rcond=None)[0][: features.shape[1]] * scale


def quadratic_features(x: np.ndarray) -> np.ndarray:
    """[n, d] -> [n, 1 + d + d (d + 1) / 2]: 1, x_i, x_i^2, x_i x_j."""
    n, dims = x.shape
    columns = [np.ones(n), *x.T, *(x**2).T]
    columns += [x[:, i] * x[:, j] for i in range(dims) for j in range(i + 1, dims)]
    return np.stack(columns, 1)


def _coordinates(points: Sequence[Point], axes: Sequence[Axis]) -> np.ndarray:
    rows = [[p.u] if len(axes) == 1 else [p.u, p.guidance] for p in points]
    return np.array(rows, dtype=np.float64).reshape(-1, len(axes))
