"""The settings of the quickstart, and of its fast form, which shows that everything runs and goes the right way.

`BASE` trains theta_base on real digits; `RECIPE` is the row: synthetic set, fine-tune, merge weight, evaluation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from neon_core.backbone import Recipe, TrainSettings
from neon_core.schedules import Ema, LinearRamp, RampThenCosine
from neon_edm.quickstart.digits import IMG_SIZE, NUM_CLASSES

BATCH = 128
NO_SNAPSHOTS = 1 << 60  # but the last

NETWORK = {  # the arguments of EDMPrecond and, after model_type, of the denoiser
    "img_resolution": IMG_SIZE,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "sigma_data": 0.75,  # the digits' standard deviation, 0.751
    "model_type": "DigitsDenoiser",
    "label_dropout": 0.1,
}
SAMPLER = {"num_steps": 18}


def base_training(num_steps: int) -> TrainSettings:
    """Real digits -> theta_base: a short training, so that there is something left to repair."""
    return TrainSettings(
        images=num_steps * BATCH,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        lr=1e-3,
        schedule=RampThenCosine(ramp_images=100 * BATCH, images=num_steps * BATCH, batch_size=BATCH),
        ema=Ema(decay=0.998, warmup_steps=10),
        snapshot_images=NO_SNAPSHOTS,
    )


FINE_TUNE = TrainSettings(
    images=50 * BATCH,
    batch_size=BATCH,
    micro_batch_size=BATCH,
    lr=1e-4,
    schedule=LinearRamp(20 * BATCH),
    ema=Ema(decay=0.99, warmup_steps=10),
    snapshot_images=NO_SNAPSHOTS,
)


@dataclass(frozen=True)
class Quickstart:
    """One run of the quickstart, for any number of seeds."""

    base: TrainSettings
    recipe: Recipe
    num_evaluate: int  # images per distance
    w_grid: tuple[float, ...] = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # -1 is theta_syn itself
    feature_steps: int = 600
    judged: bool = True  # by the acceptance rule; otherwise only by the directions of change


DEFAULT = Quickstart(
    base=base_training(4000),
    recipe=Recipe(
        name="digits",
        num_synthetic=2000,
        generate=SAMPLER,
        train=FINE_TUNE,
        w=1.0,  # held-out feature distance 2.5 -> 1.7 without any selection
        evaluate=SAMPLER,
        fid_stats="",  # measured in the run, with its own feature network
    ),
    num_evaluate=4000,
)

FAST = dataclasses.replace(
    DEFAULT,
    base=base_training(800),
    recipe=dataclasses.replace(DEFAULT.recipe, name="digits_fast", num_synthetic=500),
    num_evaluate=500,
    w_grid=(-1.0, 0.0, 0.5, 1.0, 1.5, 2.0),
    feature_steps=200,
    judged=False,
)
