"""The Fashion-MNIST rows: theta_base, S, the fine-tune and the search in minutes on one CPU core."""

from __future__ import annotations

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_run.fashion.rows import fashion_row
from neon_run.row import Acceptance, Grid, Range, Row
from neon_var.backbone import VARBackbone
from neon_var.fashion.prepare import PrepareVAR
from neon_var.fashion.tokenizer import PATCH_NUMS

BATCH = 128
FILTER = {"top_p": 0.9}  # held fixed, as in the paper's searches

BASE = TrainSettings(
    images=160_000,
    batch_size=BATCH,
    micro_batch_size=BATCH,
    lr=2e-3,
    schedule=LinearRamp(100 * BATCH),
    optimizer="adamw",
    betas=(0.9, 0.95),
    clip_norm=2.0,
    ema=Ema(decay=0.998, warmup_steps=10),
)
FINE_TUNE = TrainSettings(
    images=40 * BATCH,
    batch_size=BATCH,
    micro_batch_size=BATCH,
    lr=4e-4,
    schedule=LinearRamp(40 * BATCH),
    optimizer="adamw",
    betas=(0.9, 0.95),
    clip_norm=2.0,
    snapshot_images=40 * BATCH,
)


def fixed_filter(prepare: PrepareVAR, train: TrainSettings = FINE_TUNE, num_synthetic: int = 6_000) -> Row:
    """Guidance is searched together with w, the filter is not."""
    return fashion_row(
        "var/fashion",
        VARBackbone,
        prepare,
        Acceptance(neon=0.75, self_trained=1.3, controls=0.94),
        num_synthetic=num_synthetic,
        generate={"cfg": 0.0, **FILTER, "tokens": True},
        train=train,
        load_training={"crop": "none"},  # of the control on real images, as in theta_base's training
        w=1.0,
        evaluate={"cfg": 0.0, **FILTER},
        batch_size=500,
        evaluations=lambda settings: 2 * len(PATCH_NUMS),
        w_range=(0.0, 3.0),
        axes={"cfg": Range(-0.5, 1.5)},  # the best of the base lies near 0; below, the class counts for less
        grid=Grid((0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0), {"cfg": (-0.5, 0.0, 0.5, 1.0, 1.5)}),
    )


FASHION_ROWS = (fixed_filter(PrepareVAR(BASE)),)
