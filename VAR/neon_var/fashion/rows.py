"""The Fashion-MNIST rows: theta_base, S, the fine-tune and the search in minutes on one CPU core."""

from __future__ import annotations

from typing import Any

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema
from neon_run.fashion.rows import BATCH, fashion_row, training
from neon_run.row import Acceptance, Grid, Range, Row
from neon_var.backbone import VARBackbone
from neon_var.fashion.prepare import PrepareVAR
from neon_var.fashion.tokenizer import PATCH_NUMS

FILTER = {"top_p": 0.9}  # as the paper's searches hold theirs fixed
GUIDANCE = Range(-0.5, 1.5)  # the best of the base lies near 0; below, the class counts for less
GRID_WS, GRID_GUIDANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (-0.5, 0.0, 0.5, 1.0, 1.5)

ADAMW: dict[str, Any] = {"optimizer": "adamw", "betas": (0.9, 0.95), "clip_norm": 2.0}
BASE = training(1_250, 100, 2e-3, Ema(decay=0.998, warmup_steps=10), **ADAMW)
FINE_TUNE = training(40, 40, 4e-4, snapshot_images=40 * BATCH, **ADAMW)


def _row(name: str, prepare: PrepareVAR, train: TrainSettings, num_synthetic: int, **fields: Any) -> Row:
    """S is drawn with the filter, which makes it narrower than the real images, and kept as tokens."""
    return fashion_row(
        f"var/{name}",
        VARBackbone,
        prepare,
        num_synthetic=num_synthetic,
        generate={"cfg": 0.0, **FILTER, "tokens": True},
        train=train,
        load_training={"crop": "none"},  # of the control on real images, as in theta_base's training
        w=1.0,
        batch_size=500,
        evaluations=lambda settings: 2 * len(PATCH_NUMS),
        w_range=(0.0, 3.0),
        **fields,
    )


def fixed_filter(prepare: PrepareVAR, train: TrainSettings = FINE_TUNE, num_synthetic: int = 6_000) -> Row:
    """Guidance is searched together with w, the filter is not."""
    return _row(
        "fashion",
        prepare,
        train,
        num_synthetic,
        acceptance=Acceptance(neon=0.75, self_trained=1.3, controls=0.94),
        evaluate={"cfg": 0.0, **FILTER},
        axes={"cfg": GUIDANCE},
        grid=Grid(GRID_WS, {"cfg": GRID_GUIDANCES}),
    )


def retuned(prepare: PrepareVAR, train: TrainSettings = FINE_TUNE, num_synthetic: int = 6_000) -> Row:
    """Guidance, filter and temperature are searched, for base and Neon alike. It claims nothing: without a filter,
    cross-entropy leaves token probabilities calibrated, and there is little left to widen."""
    return _row(
        "fashion_retuned",
        prepare,
        train,
        num_synthetic,
        evaluate={"cfg": 0.0, **FILTER, "temperature": 1.0},
        axes={"cfg": GUIDANCE, "top_p": Range(0.8, 1.0), "temperature": Range(0.8, 1.4)},
        grid=Grid(
            GRID_WS, {"cfg": GRID_GUIDANCES, "top_p": (0.8, 0.9, 0.95, 1.0), "temperature": (0.8, 1.0, 1.2, 1.4)}
        ),
    )


FASHION_ROWS = (fixed_filter(PrepareVAR(BASE)), retuned(PrepareVAR(BASE)))
