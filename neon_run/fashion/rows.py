"""The settings that all rows on Fashion-MNIST share, and how their results are judged."""

from __future__ import annotations

from typing import Any

from neon_core.backbone import Backbone, TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_run.fashion.features import read_detector
from neon_run.fashion.prepare import PrepareFashion
from neon_run.row import Acceptance, Protocol, Row

BATCH = 128  # images per step of every training
SYNTHETIC_FROM, EVALUATE_FROM, NUM_EVALUATE = 0, 1_000_000, 5_000
SEARCH_IMAGES = 2_000  # per setting


def training(steps: int, ramp_steps: int, lr: float, ema: Ema | None = None, **settings: Any) -> TrainSettings:
    """`steps` batches of 128: a ramp of the rate, then a constant one, so that nothing depends on the end, and
    a base can go on to twice its length; `settings` are further fields."""
    common = {"micro_batch_size": BATCH, "schedule": LinearRamp(ramp_steps * BATCH), **settings}
    return TrainSettings(images=steps * BATCH, batch_size=BATCH, lr=lr, ema=ema, **common)


def fashion_row(
    id: str,
    backbone: type[Backbone],
    prepare: PrepareFashion,
    acceptance: Acceptance | None = None,
    control_images: int = NUM_EVALUATE,
    **fields: Any,
) -> Row:
    """A row on Fashion-MNIST: searched against the training part, reported on two fresh blocks of seeds against
    held-out images."""
    return Row(
        id=id,
        backbone=backbone,
        prepare=prepare,
        detector=read_detector,
        distance="feature distance",
        synthetic_seed=SYNTHETIC_FROM,
        evaluate_seeds=f"{EVALUATE_FROM}-{EVALUATE_FROM + NUM_EVALUATE - 1}",
        protocol=Protocol(
            ranking_images=SEARCH_IMAGES,
            deciding_images=SEARCH_IMAGES,
            control_images=control_images,
            controls_twice=True,
            fresh_blocks=2,
            acceptance=acceptance,
        ),
        **fields,
    )
