"""A search for the snapshot, w and up to three settings of the sampler that needs a tenth of the images of a grid.

What makes it cheap: FID is locally quadratic, so a few points and refinements find the valley; all points share their
seeds, so most of the noise and of the finite-sample bias is the same at every point and few images rank them; only the
two best are measured with many. The length of the step, w |theta_syn - theta_base|, changes little from snapshot to
snapshot, so one snapshot's optimum predicts the next one's. `docs/search.md` has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from neon_files.errors import UserError

Settings = dict[str, float]  # of the sampler, those that a search varies; whole numbers where it takes no others
Measure = Callable[[str, float, Settings, int], float]  # snapshot, w, settings, images -> FID

# Set on the simulated surfaces of benchmarks/search.py, seeds 0-49; its tables are of other seeds.
RADIUS, RADIUS_NEXT = 1.25, 0.9  # of the trust region at the start, in first steps: first snapshot, further ones
GROW, SHRINK = 1.4, 0.6  # after a step that gained most of the predicted gain, after one that gained nothing
SIDE = {1: 61, 2: 61, 3: 17, 4: 11}  # places along each side of the trust region, by the number of axes
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
    whole: bool = False  # takes whole numbers only; then so are low and high

    def clip(self, value: float) -> float:
        """The nearest value that it may have."""
        return float(min(max(round(value) if self.whole else value, self.low), self.high))

    def setting(self, value: float) -> float:
        """The value as the sampler wants it."""
        return int(value) if self.whole else value


@dataclass(frozen=True)
class Point:
    """One measured setting. `u` is w in units of the reference snapshot's step length."""

    snapshot: str
    w: float
    settings: Settings
    u: float
    images: int
    fid: float

    @property
    def place(self) -> tuple:
        """Equal for points of one setting: at w = 0 every snapshot is the base."""
        return (self.snapshot if self.w else "base", self.w, *self.settings.items())


@dataclass(frozen=True)
class Budget:
    """The cost of a search: settings per snapshot, images while ranking, and for the last two."""

    settings: tuple[int, ...] = (5, 10, 18, 26)  # for w alone, and with one, two, three settings of the sampler
    settings_next: tuple[int, ...] = (3, 6, 11, 16)  # of each further snapshot; the best gets all `settings`
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
            cost[p.place] = max(cost.get(p.place, 0), p.images)
        return sum(cost.values())


def search(
    measure: Measure,
    snapshots: Mapping[str, float],
    w: Axis,
    further: Mapping[str, Axis],
    budget: Budget | None = None,
) -> Found:
    """Find the setting with the lowest FID. `snapshots`: name -> |theta_syn - theta_base|, in the order to try them.
    `further`: name -> axis of up to three settings of the sampler, guidance first.

    The first snapshot gets the whole design, as many points as a quadratic has coefficients, and trust-region steps on
    the refitted quadratic; each further one starts at the predicted optimum with the shape already fitted, and the best
    of them gets as many settings as the first. Then the two best settings of all are measured with `deciding_images`,
    and the lower wins.
    """
    budget = budget or Budget()
    names = list(snapshots)
    axes = [w, *further.values()]
    total, total_next = budget.settings[len(further)], budget.settings_next[len(further)]
    points: list[Point] = []
    radius: dict[str, float] = {}

    def at(name: str, x: np.ndarray) -> Point:
        u, *values = (axis.clip(float(value)) for axis, value in zip(axes, x, strict=True))
        settings = {n: axis.setting(value) for (n, axis), value in zip(further.items(), values, strict=True)}
        own_w, few = round(u * snapshots[names[0]] / snapshots[name], 6), budget.ranking_images
        point = Point(name, own_w, settings, u, few, measure(name, own_w, settings, few))
        points.append(point)
        return point

    def refine(name: str, count: int) -> None:
        """Trust-region steps, until the snapshot has `count` settings."""
        measured = [p for p in points if p.snapshot == name]
        others = [p for p in points if p.snapshot != name]
        while len(measured) < count:
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
            star = [at(name, x) for x in first_design(axes)[:total]]
            if not _any_finite(star):  # a broken snapshot: the next one shows the way
                continue
            if len(star) < total:
                for x in corners(star, axes)[: total - len(star)]:
                    at(name, x)
            refine(name, total)
        else:
            radius[name] = RADIUS_NEXT
            at(name, _coordinates(ranked(points, axes)[:1], axes)[0])
            refine(name, total_next)
    if not _any_finite(points):
        raise UserError("no setting of the search gave finite images; check the snapshots, or search smaller w")
    refine(ranked(points, axes)[0].snapshot, total)

    many = budget.deciding_images
    finalists = ranked(points, axes)[:2]
    decided = [replace(p, images=many, fid=measure(p.snapshot, p.w, p.settings, many)) for p in finalists]
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


def corners(star: Sequence[Point], axes: Sequence[Axis]) -> list[np.ndarray]:
    """For the cross term of each pair of axes, a step to the lower side of both: then the points are as many as the
    coefficients of a quadratic."""
    x = _coordinates(star, axes)
    lower = [x[min((2 * i + 1, 2 * i + 2), key=lambda k: star[k].fid), i] for i in range(len(axes))]
    out = []
    for pair in combinations(range(len(axes)), 2):
        corner = x[0].copy()
        for i in pair:
            corner[i] = lower[i]
        out.append(corner)
    return out


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
    side = np.linspace(-radius, radius, SIDE[len(axes)])
    grid = np.stack(np.meshgrid(*[side] * len(axes), indexing="ij"), -1).reshape(-1, len(axes))
    grid = grid[np.linalg.norm(grid, axis=1) <= radius] + x[best]
    inside = np.all([(a.low <= q * a.step) & (q * a.step <= a.high) for a, q in zip(axes, grid.T, strict=True)], axis=0)
    grid = grid[inside]
    for i in (i for i, axis in enumerate(axes) if axis.whole):
        grid[:, i] = np.round(grid[:, i] * steps[i]) / steps[i]
    nearest = np.min(np.linalg.norm(grid[:, None] - x[None], axis=-1), axis=1)
    grid = grid[nearest > min(MIN_DISTANCE, 0.5 * radius)]
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
            estimates[p.place] = ((p.fid + value) / 2, p)
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
    along the diagonal of the first two axes, and of no others, since nothing is known of them. The prior decides where
    the points do not. The higher above the lowest, the less a point counts, since the surface is quadratic only near
    its floor. Groups share the second derivatives; constant and slope are separate.
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
    crossed = list(combinations(range(d), 2))
    prior[second] = ROUND * rise * np.array([1.0] * d + [-2 * DIAGONAL if pair == (0, 1) else 0.0 for pair in crossed])
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
    rows = [[p.u, *p.settings.values()] for p in points]
    return np.array(rows, dtype=np.float64).reshape(-1, len(axes))
