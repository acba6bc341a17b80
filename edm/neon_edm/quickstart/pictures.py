"""The two pictures: the distance against w for every seed, and the same noise drawn by three sets of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from neon_edm.quickstart.digits import load_digits_split
from neon_files.atomic import atomic_path
from neon_files.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RED, GREEN = "#1d2733", "#74808c", "#b23b2e", "#217346"
SEED_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct for colour-blind readers
DPI = 160

ZOOM, GAP = 6, 6  # picture pixels per image pixel, and between images
COLUMNS, ROWS = 10, 6  # a column is a class
MARGIN, BETWEEN, HEAD = 36, 72, 76  # picture pixels: around, between the panels' columns, above each panel
PANELS = (  # left to right, top to bottom
    ("self_trained", "self-trained", "w = -1", RED),
    ("base", "base", "w = 0", INK),
    ("neon", "Neon", "w = {w_star:.3g}", GREEN),
    ("real", "real digits", "held out", INK),
)


def check_available() -> None:
    """Raises UserError where the pictures could not be drawn in the end."""
    figure(1, 1)


def figure(width: float, height: float) -> Figure:
    """A figure that is drawn without a display and without pyplot's global state; sizes in inches. Raises UserError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the pictures need matplotlib, which is missing; pip install matplotlib") from error
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI)


def draw_curve(results: Sequence[dict], path: Path) -> None:
    """Held-out feature distance against w, each seed relative to its own base; Neon's choice and the random control."""
    fig = figure(8.0, 4.4)
    ax = fig.add_axes((0.095, 0.125, 0.885, 0.735))
    for number, result in enumerate(results):
        _draw_seed(ax, result, SEED_COLORS[number % len(SEED_COLORS)])
    ax.plot([], [], "*", color=INK, ms=12, mec="white", label="w*: found by the search on training digits")
    ax.plot([], [], "x", color=INK, ms=7, mew=1.8, label="control: random direction of equal length")
    ax.legend(loc="upper right", frameon=False, fontsize=9.5, labelcolor=INK, borderaxespad=1.2)

    grid = [point["w"] for result in results for point in result["curve"]]
    left, right = min(grid) - 0.15, max(grid) + 0.15
    ax.set_xlim(left, right)
    ax.axvspan(left, 0, color="#fbeceb", zorder=0, lw=0)
    ax.axhline(1.0, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
    ax.axvline(0.0, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
    ax.grid(axis="y", color="#e6eaee", lw=0.8)
    ax.set_axisbelow(True)
    ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0] - 0.05))
    ax.set_xlabel(r"$w$   in   $\theta_{\rm base} - w\,(\theta_{\rm syn} - \theta_{\rm base})$", color=INK, fontsize=11)
    ax.set_ylabel("distance to held-out digits, base = 1", color=INK, fontsize=11)
    ax.tick_params(colors=INK, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    places = ((-1, "self-trained", RED), (0, "base", INK), (right / 2, "Neon: the same step backwards", GREEN))
    for w, text, color in places:
        ax.text(w, 1.025, text, transform=ax.get_xaxis_transform(), ha="center", color=color, fontsize=11)
    fig.text(0.012, 0.945, "Neon on handwritten digits: lower is better", color=INK, fontsize=13, weight="bold")
    save(fig, path)


def _draw_seed(ax: Axes, result: dict, color: str) -> None:
    report, w_star = result["report"], result["w_star"]
    curve = {point["w"]: point["heldout"] for point in result["curve"]}
    ratios = [distance / curve[0.0] for distance in curve.values()]
    ax.plot(list(curve), ratios, "-o", color=color, lw=1.8, ms=4, zorder=3, label=f"seed {result['seed']}")
    styles: dict[str, dict[str, Any]] = {
        "neon": {"marker": "*", "ms": 16, "mec": "white", "mew": 0.8},
        "random_direction": {"marker": "x", "ms": 7, "mew": 1.8},
    }
    for place, style in styles.items():
        ratio = report[place]["heldout"] / report["base"]["heldout"]
        ax.plot(w_star, ratio, color=color, ls="none", zorder=4, **style)


def read_samples(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """uint8 [ROWS * COLUMNS, 1, 8, 8] of every panel: samples that `neon reproduce` wrote, and held-out digits."""
    digits, labels = load_digits_split(seed), torch.arange(ROWS * COLUMNS) % COLUMNS
    samples = {"real": in_label_order(digits.heldout_images, digits.heldout_labels, labels).numpy()}
    for key, name in (("self_trained", "self-trained"), ("base", "base"), ("neon", "neon")):
        paths = sorted((folder / name).glob("*.png"))[: len(labels)]
        samples[key] = np.stack([np.asarray(PIL.Image.open(path))[None] for path in paths])
    return samples


def in_label_order(images: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each wanted label the next image that has it."""
    indices = {int(k): iter(torch.nonzero(labels == k).flatten().tolist()) for k in wanted.unique()}
    return images[torch.tensor([next(indices[int(k)]) for k in wanted])]


def tile(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 1, H, W] -> one uint8 picture [h, w] of the first ROWS x COLUMNS, dark ink on white, every image pixel
    a ZOOM x ZOOM square."""
    height, width = (ZOOM * side for side in images.shape[2:])
    sheet = np.full((ROWS * (height + GAP) - GAP, COLUMNS * (width + GAP) - GAP), 255, dtype=np.uint8)
    for i, image in enumerate(images[: ROWS * COLUMNS, 0]):
        top, left = (i // COLUMNS) * (height + GAP), (i % COLUMNS) * (width + GAP)
        sheet[top : top + height, left : left + width] = 255 - np.kron(image, np.ones((ZOOM, ZOOM), dtype=np.uint8))
    return sheet


def draw_grid(samples: dict[str, np.ndarray], result: dict, path: Path) -> None:
    """Self-trained, base and Neon samples of the same noise, and real digits; with their distances of `result`.

    `samples` holds uint8 [N, 1, 8, 8] under the names in PANELS, label i = i mod 10. Pixels are copied, not resampled.
    """
    sheets = [tile(samples[key]) for key, *_ in PANELS]
    side_h, side_w = sheets[0].shape
    width, height = 2 * (MARGIN + side_w) + BETWEEN, MARGIN + 2 * (HEAD + side_h)
    fig = figure(width / DPI, height / DPI)
    for number, (sheet, (key, title, note, color)) in enumerate(zip(sheets, PANELS, strict=True)):
        left = MARGIN + (number % 2) * (side_w + BETWEEN)
        bottom = MARGIN + (1 - number // 2) * (side_h + HEAD)
        fig.figimage(np.stack([sheet] * 3, axis=-1), left, bottom, origin="upper")  # RGB: no colour map, no rounding
        if key != "real":
            note += f",  distance {result['report'][key]['heldout']:.2f}"
        place = {"y": (bottom + side_h + 18) / height, "va": "baseline"}
        fig.text(left / width, s=title, color=color, fontsize=15, weight="bold", **place)
        note = note.format(w_star=result["w_star"])
        fig.text((left + side_w) / width, s=note, color=MUTED, fontsize=11, ha="right", **place)
    save(fig, path)
