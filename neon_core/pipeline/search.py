"""A search for (snapshot, w, guidance) that needs a tenth of the images of a grid.

What makes it cheap: FID is locally quadratic in (w, guidance), so six points and a few refinements find the valley; all
points share their seeds, so most of the noise and of the finite-sample bias is the same at every point and few images
rank them; only the two best are measured with many. The length of the step, w |theta_syn - theta_base|, changes little
from snapshot to snapshot, so one snapshot's optimum says where to look in the next. `docs/search.md` has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Measure = Callable[[str, float, float | None, int], float]  # snapshot, w, guidance, images -> FID

# Set on the simulated surfaces of benchmarks/search.py, seeds 0-49; its table is of other seeds.
RADIUS, GROW, SHRINK = 1.25, 1.4, 0.6  # trust region, in first steps: at the start, after a good step, after a bad one
BOWL = 0.1  # weight of the pull towards a round bowl, against 1 for a measurement


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
    """How much a search may spend: settings per snapshot, images while ranking, and for the last two."""

    settings: int = 12
    settings_next: int = 4  # per further snapshot, where the first has shown the way
    ranking_images: int = 3_500
    deciding_images: int = 10_000


@dataclass
class Found:
    """The best point, everything measured on the way, and the images that were sampled for it."""

    best: Point
    points: list[Point] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Each setting's statistics are extended, not made again: its largest count is what it cost."""
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
    refitted quadratic; each further one starts at the predicted optimum with the shape already found. Then the two best
    settings of all are measured with `deciding_images`, and the lower wins.
    """
    budget = budget or Budget()
    names = list(snapshots)
    reference = snapshots[names[0]]
    points: list[Point] = []

    def at(name: str, x: np.ndarray, images: int) -> Point:
        u = w.clip(float(x[0]))
        g = guidance.clip(float(x[1])) if guidance else None
        here = round(u * reference / snapshots[name], 6)
        point = Point(name, here, g, u, images, measure(name, here, g, images))
        points.append(point)
        return point

    axes = [w] + ([guidance] if guidance else [])
    centre = np.array([a.start for a in axes])
    for number, name in enumerate(names):
        if number == 0:
            design, total = first_design(axes), budget.settings
        else:
            best = min((p for p in points if p.snapshot == names[number - 1]), key=lambda p: p.fid)
            centre = _coordinates([best], axes)[0]
            design, total = [centre], budget.settings_next
        own = [at(name, x, budget.ranking_images) for x in design[:total]]
        radius = RADIUS if number == 0 else RADIUS / 2
        while len(own) < total:
            borrowed = [] if number == 0 else [p for p in points if p.snapshot != name]
            x, predicted = next_point(own, axes, radius, borrowed)
            if x is None:
                break
            best_so_far = min(p.fid for p in own)
            point = at(name, x, budget.ranking_images)
            own.append(point)
            gained = best_so_far - point.fid
            radius *= GROW if gained > 0.5 * max(predicted, 1e-9) else SHRINK

    by_fid = sorted(points, key=lambda p: p.fid)
    finalists: list[Point] = []
    for p in by_fid:
        if all((p.snapshot, p.w, p.guidance) != (q.snapshot, q.w, q.guidance) for q in finalists):
            finalists.append(p)
        if len(finalists) == 2:
            break
    decided = [
        Point(p.snapshot, p.w, p.guidance, p.u, budget.deciding_images,
              measure(p.snapshot, p.w, p.guidance, budget.deciding_images))
        for p in finalists
    ]  # fmt: skip
    return Found(min(decided, key=lambda p: p.fid), points + decided)


def first_design(axes: Sequence[Axis]) -> list[np.ndarray]:
    """The fewest points that determine a quadratic: the centre, a step to both sides of each axis, and one diagonal
    (more w wants more guidance, so the valley runs that way)."""
    centre = np.array([a.start for a in axes])
    design = [centre]
    for i, axis in enumerate(axes):
        for sign in (1, -1):
            x = centre.copy()
            x[i] = axis.clip(x[i] + sign * axis.step)
            design.append(x)
    if len(axes) == 2:
        design.append(np.array([a.clip(a.start + a.step) for a in axes]))
    return design


def next_point(
    own: Sequence[Point], axes: Sequence[Axis], radius: float, borrowed: Sequence[Point] = ()
) -> tuple[np.ndarray | None, float]:
    """Where the fitted quadratic is lowest within `radius` first steps of the best point, and the gain it promises.

    The fit is minimised over a fine grid of the trust region, so an indefinite Hessian leads to the region's rim, not
    to infinity. `borrowed` points of other snapshots lend their shape: they enter with an offset of their own. None
    where every place of the region has been measured.
    """
    steps = np.array([a.step for a in axes])
    x = _coordinates([*own, *borrowed], axes) / steps
    y = np.array([p.fid for p in [*own, *borrowed]])
    best = int(np.argmin(y[: len(own)]))
    coefficients = fit_quadratic(x - x[best], y, groups=[p.snapshot for p in [*own, *borrowed]])
    side = np.linspace(-radius, radius, 61)
    grid = np.stack(np.meshgrid(*[side] * len(axes), indexing="ij"), -1).reshape(-1, len(axes))
    grid = grid[(np.linalg.norm(grid, axis=1) <= radius)]
    inside = np.all(
        [(a.low <= (x[best][i] + grid[:, i]) * a.step) & ((x[best][i] + grid[:, i]) * a.step <= a.high)
         for i, a in enumerate(axes)], axis=0,
    )  # fmt: skip
    measured = x[: len(own)] - x[best]
    apart = np.min(np.linalg.norm(grid[:, None] - measured[None], axis=-1), axis=1) > min(0.2, 0.5 * radius)
    grid = grid[inside & apart]
    if not len(grid):
        return None, 0.0
    values = quadratic_features(grid) @ coefficients
    chosen = int(np.argmin(values))
    return (x[best] + grid[chosen]) * steps, float(coefficients[0] - values[chosen])


def fit_quadratic(x: np.ndarray, y: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """Coefficients of 1, x_i, x_i x_j (see `quadratic_features`) for the first group's level.

    Weighted least squares: points far above the lowest count less, since the surface is quadratic only near its floor.
    A faint pull of the second derivatives towards a round bowl decides what the data leave open. Other groups have
    their own constant.
    """
    groups = list(groups or [""] * len(y))
    others = [g for g in dict.fromkeys(groups) if g != groups[0]]
    design = quadratic_features(x)
    dummies = np.array([[float(g == other) for other in others] for g in groups]).reshape(len(y), len(others))
    floors = {g: min(v for v, h in zip(y, groups, strict=True) if h == g) for g in set(groups)}
    above = np.array([v - floors[g] for v, g in zip(y, groups, strict=True)])
    scale = max(np.median(above), 1e-6)
    weights = 1.0 / (1.0 + (above / (2 * scale)) ** 2)
    dims = x.shape[1]
    columns = np.concatenate([design, dummies], 1)
    # the bowl: as steep as the mean rise per squared distance of the points themselves
    bowl = max(float(np.median(above / np.maximum((x**2).sum(1), 0.25))), 1e-6)
    pull, target = np.zeros((0, columns.shape[1])), []
    for name, column in _second_order(dims):
        row = np.zeros(columns.shape[1])
        row[column] = BOWL
        pull = np.concatenate([pull, row[None]])
        target.append(BOWL * (bowl if name == "square" else 0.0))
    a = np.concatenate([columns * weights[:, None] ** 0.5, pull])
    b = np.concatenate([y * weights**0.5, target])
    solution, *_ = np.linalg.lstsq(a, b, rcond=None)
    return solution[: design.shape[1]]


def quadratic_features(x: np.ndarray) -> np.ndarray:
    """[n, d] -> [n, 1 + d + d (d + 1) / 2]: 1, x_i, x_i^2, x_i x_j."""
    n, dims = x.shape
    columns = [np.ones(n), *x.T, *(x**2).T]
    columns += [x[:, i] * x[:, j] for i in range(dims) for j in range(i + 1, dims)]
    return np.stack(columns, 1)


def _second_order(dims: int) -> list[tuple[str, int]]:
    squares = [("square", 1 + dims + i) for i in range(dims)]
    return squares + [("cross", 1 + 2 * dims + k) for k in range(dims * (dims - 1) // 2)]


def _coordinates(points: Sequence[Point], axes: Sequence[Axis]) -> np.ndarray:
    rows = [[p.u] if len(axes) == 1 else [p.u, p.guidance] for p in points]
    return np.array(rows, dtype=np.float64).reshape(-1, len(axes))
