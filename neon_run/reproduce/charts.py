"""Plots as inline SVG: FID over w, over w and a setting of the sampler, and of several runs. Nothing but strings, so
that a report needs no plotting package and no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 340, 76, 18, 16, 48
SCALE = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))  # low FID bright, high FID dark
CELLS = 48
CAP = 2.5  # height of the plot of FID over w, in units of the distance between the best point and the base


class Frame:
    """Maps data to the plot's pixels and draws axes with round numbers."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str):
        self.x, self.y = (_widened(*limits) for limits in (x, y))
        self.labels = x_label, y_label

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def svg(self, body: Sequence[str], under: Sequence[str] = (), title: str = "") -> str:
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            *under,
            *self._axes(grid=not under),
            *body,
            "</svg>",
        ]
        return "\n".join(parts)

    def _axes(self, grid: bool) -> list[str]:
        lines = []
        for value in ticks(*self.x):
            px, bottom = self.at(value, self.y[0])
            lines.append(f'<line class="tick" x1="{px:.1f}" x2="{px:.1f}" y1="{bottom:.1f}" y2="{bottom + 5:.1f}"/>')
            lines.append(f'<text x="{px:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y):
            left, py = self.at(self.x[0], value)
            if grid:
                lines.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
            lines.append(f'<text x="{left - 8:.1f}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>')
        box = (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
        lines.append('<rect class="box" x="{}" y="{}" width="{}" height="{}"/>'.format(*box))
        middle = LEFT + box[2] / 2, TOP + box[3] / 2
        lines.append(
            f'<text class="label" x="{middle[0]}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.labels[0])}</text>'
        )
        lines.append(
            f'<text class="label" transform="translate(15 {middle[1]}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.labels[1])}</text>"
        )
        return lines


def curve_over_w(
    curve: Sequence[tuple[float, float]],
    searched: Sequence[tuple[float, float]],
    best: float,
    base: tuple[str, float],
    distance: str = "FID",
) -> str:
    """`curve`: (w, FID) at Neon's settings; `searched`: the search's points, at other n and settings; `base`: its
    label and its FID, which is drawn as a line."""
    curve, (base_name, base_fid) = sorted(curve), base
    lowest = min(fid for _, fid in curve)
    near = [fid for w, fid in curve if w >= 0] + [base_fid]
    cap = lowest + CAP * (max(near) - lowest)  # far worse points would press the rest flat
    shown = [(w, fid) for w, fid in searched if fid <= cap]
    values = [min(fid, cap) for _, fid in [*curve, *shown]] + [base_fid]
    ws = [w for w, _ in [*curve, *shown]]
    frame = Frame((min(ws), max(ws)), (min(values), max(values)), "w", distance)
    body = [_line(frame, (frame.x[0], base_fid), (frame.x[1], base_fid), "base")]
    places = [frame.at(w, min(fid, cap)) for w, fid in [*curve, *shown]]
    note = _beside_line(base_name, frame.at(frame.x[0], base_fid)[1], places)
    body += [_dot(frame, w, fid, 3, "searched", f"search: w {w:g}, {distance} {fid:.4g}") for w, fid in shown]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(w, min(fid, cap)) for w, fid in curve))
    body.append(f'<polyline class="curve" points="{path}"/>')
    for w, fid in curve:
        kind = "best" if math.isclose(w, best) else "measured"
        body.append(_dot(frame, w, min(fid, cap), 6 if kind == "best" else 4.5, kind, f"w {w:g}, {distance} {fid:.4g}"))
        if fid > cap:
            x, y = frame.at(w, cap)
            body.append(f'<text class="note" x="{x + 9:.1f}" y="{y + 4:.1f}">↑ {fid:.3g}</text>')
    return frame.svg([*body, note], title=f"{distance} over w")


def _beside_line(text: str, height: float, places: Sequence[tuple[float, float]]) -> str:
    """The label of a horizontal line, at that of its ends from which the nearest of `places` (pixels) is farther."""
    ends = {"start": LEFT + 6.0, "end": WIDTH - RIGHT - 6.0}
    middles = {"start": ends["start"] + 50, "end": ends["end"] - 50}
    room = {end: min(math.dist((x, height - 10), place) for place in places) for end, x in middles.items()}
    end = max(("end", "start"), key=room.__getitem__)
    return f'<text class="note" x="{ends[end]}" y="{height - 6:.1f}" text-anchor="{end}">{escape(text)}</text>'


def surface(
    points: Sequence[Mapping[str, Any]], best: Mapping[str, Any], name: str, distance: str = "FID"
) -> str | None:
    """FID over w and the setting `name` of one snapshot: the measured points and, where no other setting varies, under
    six of them or more the quadratic that fits them. None where the setting did not vary."""
    xyz = np.array([(p["w"], p["settings"][name], p["fid"]) for p in points], dtype=np.float64)
    if len(xyz) < 3 or np.ptp(xyz[:, 1]) == 0 or np.ptp(xyz[:, 0]) == 0:
        return None
    frame = Frame((xyz[:, 0].min(), xyz[:, 0].max()), (xyz[:, 1].min(), xyz[:, 1].max()), "w", name)
    low, high = xyz[:, 2].min(), xyz[:, 2].max()
    colour = lambda fid: _colour(max(fid - low, 0.0) / max(high - low, 1e-12))  # noqa: E731
    under = _fitted_cells(frame, xyz, colour) if len(xyz) >= 6 and len(best["settings"]) == 1 else []
    body = []
    for w, value, fid in xyz:
        x, y = frame.at(w, value)
        text = escape(f"w {w:g}, {name} {value:g}: {distance} {fid:.4g}")
        body.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour(fid)}"><title>{text}</title></circle>'
        )
    x, y = frame.at(best["w"], best["settings"][name])
    body.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="11"/>')
    return frame.svg(body, under, f"{distance} over w and {name}")


def runs(lines: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]], distance: str) -> str:
    """One line per run: (name, interval of the base, interval of Neon), each {"value", "low", "high"}."""
    height, left, step = 64 + 44 * len(lines), 170, 44
    ends = [interval[end] for _, *pair in lines for interval in pair for end in ("low", "high")]
    low, high = _widened(min(ends), max(ends))
    across = lambda value: left + (value - low) / (high - low) * (WIDTH - left - RIGHT)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(distance)} of every run">']
    for value in ticks(low, high):
        x = across(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for number, (name, *pair) in enumerate(lines):
        y = TOP + step * number + step / 2
        shown = name if len(name) <= 16 else f"…{name[-15:]}"
        parts.append(f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>')
        for kind, interval, shift in zip(("of-base", "of-neon"), pair, (-6, 6), strict=True):
            x1, x2, x = (across(interval[end]) for end in ("low", "high", "value"))
            tooltip = escape(f"{name}, {kind.removeprefix('of-')}: {interval['value']:.4g}")
            parts.append(f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y + shift}" y2="{y + shift}"/>')
            parts.append(
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y + shift}" r="4.5"><title>{tooltip}</title></circle>'
            )
    parts.append(
        f'<text class="label" x="{(left + WIDTH) / 2}" y="{height - 8}" text-anchor="middle">{escape(distance)}</text>'
    )
    return "\n".join([*parts, "</svg>"])


def colour_bar(low: float, high: float) -> str:
    """The legend of `surface`, whose colours follow the square root of the height above the lowest point."""
    stops = ", ".join(_colour((i / 8) ** 2) for i in range(9))
    marks = "".join(f"<span>{low + part * (high - low):.3g}</span>" for part in (0, 0.25, 1))
    return f'<i style="background:linear-gradient(90deg,{stops})"></i><div>{marks}</div>'


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers between low and high."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _fitted_cells(frame: Frame, xyz: np.ndarray, colour: Callable[[float], str]) -> list[str]:
    centre, spread = xyz[:, :2].mean(0), xyz[:, :2].std(0)
    features = lambda p: np.stack([np.ones(len(p)), *p.T, *(p**2).T, p[:, 0] * p[:, 1]], 1)  # noqa: E731
    near = 1 / (1 + ((xyz[:, 2] - xyz[:, 2].min()) / (np.median(xyz[:, 2] - xyz[:, 2].min()) + 1e-12)) ** 2)
    design = features((xyz[:, :2] - centre) / spread) * near[:, None] ** 0.5
    coefficients, *_ = np.linalg.lstsq(design, xyz[:, 2] * near**0.5, rcond=None)
    xs, ys = (np.linspace(*limits, CELLS + 1) for limits in (frame.x, frame.y))
    cells = []
    for i in range(CELLS):
        middles = np.stack([np.full(CELLS, (xs[i] + xs[i + 1]) / 2), (ys[:-1] + ys[1:]) / 2], 1)
        for j, value in enumerate(features((middles - centre) / spread) @ coefficients):
            (x0, y1), (x1, y0) = frame.at(xs[i], ys[j]), frame.at(xs[i + 1], ys[j + 1])
            cells.append(
                f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0 + 0.4:.1f}" height="{y1 - y0 + 0.4:.1f}" '
                f'fill="{colour(value)}"/>'
            )
    return [f'<g class="fit">{"".join(cells)}</g>']


def _dot(frame: Frame, x: float, y: float, radius: float, kind: str, tooltip: str) -> str:
    px, py = frame.at(x, y)
    return f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}"><title>{escape(tooltip)}</title></circle>'


def _line(frame: Frame, start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    (x1, y1), (x2, y2) = frame.at(*start), frame.at(*end)
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _widened(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or max(abs(low), 1.0) * 0.1
    return low - room, high + room


def _colour(part: float) -> str:
    place = min(max(float(part), 0.0), 1.0) ** 0.5 * (len(SCALE) - 1)
    i = min(int(place), len(SCALE) - 2)
    mixed = [round(a + (b - a) * (place - i)) for a, b in zip(SCALE[i], SCALE[i + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)
