"""The settings of the quickstart as a row of `neon reproduce`, and of its fast form, which shows that everything runs
and goes the right way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema, LinearRamp, RampThenCosine
from neon_edm.guidance import passes_per_image
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.features import read_detector
from neon_edm.quickstart.prepare import BATCH, PrepareDigits
from neon_run.reproduce.reproduction import Plan
from neon_run.row import Grid, Range, Row

NO_SNAPSHOTS = 1 << 60  # but the last
SAMPLER = {"num_steps": 18}
SAMPLE_BATCH = 500
GRID_WS = tuple(0.25 * i for i in range(13))
GRID_GUIDANCES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
SAMPLES = (6, 10)  # a column is a class
SEEDS_PER_RUN = 1_000_000  # of image seeds
EVALUATE_FROM = 200_000  # those before it are the synthetic set's


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

    name: str
    base: TrainSettings
    num_evaluate: int  # images per distance
    ranking_images: int  # per setting of the search
    num_synthetic: int = 2000
    train: TrainSettings = FINE_TUNE
    w: float = 1.0  # where the search begins; good without any selection
    curve: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)  # w of the report's curve, beside -1, 0 and the chosen one
    feature_steps: int = 600
    guidance: float | None = None  # where its search begins
    guidance_range: Range | None = None  # searched together with w
    judged: bool = True  # by the acceptance rule; otherwise only by the directions of change

    @property
    def evaluate(self) -> dict[str, Any]:
        """Sampler settings of the distances."""
        return SAMPLER if self.guidance is None else {**SAMPLER, "guidance": self.guidance}

    def row(self, seed: int = 0, backbone: type[DigitsBackbone] = DigitsBackbone) -> Row:
        """The row of one run. Its images have seeds of their own: two runs share no noise."""
        first = seed * SEEDS_PER_RUN + EVALUATE_FROM
        return Row(
            id=f"edm/{self.name}",
            backbone=backbone,
            num_synthetic=self.num_synthetic,
            generate=SAMPLER,
            train=self.train,
            w=self.w,
            evaluate=self.evaluate,
            synthetic_seed=seed * SEEDS_PER_RUN,
            evaluate_seeds=f"{first}-{first + self.num_evaluate - 1}",
            batch_size=SAMPLE_BATCH,
            w_range=(0.0, 3.0),
            grid=Grid(
                GRID_WS, {"guidance": GRID_GUIDANCES} if self.guidance_range else {}, num_images=self.num_evaluate
            ),
            axes={"guidance": self.guidance_range} if self.guidance_range else {},
            evaluations=passes_per_image,
            prepare=PrepareDigits(self.base, self.feature_steps),
            detector=read_detector,
            distance="feature distance",
        )

    def plan(self, seed: int) -> Plan:
        """What `neon reproduce` is asked for."""
        return Plan(seed=seed, ranking_images=self.ranking_images, curve=self.curve, samples=SAMPLES)


DEFAULT = Quickstart(name="digits", base=base_training(4000), num_evaluate=4000, ranking_images=1000)

GUIDED = dataclasses.replace(
    DEFAULT,
    name="digits_guided",
    train=dataclasses.replace(
        FINE_TUNE,
        images=100 * BATCH,
        snapshot_images=50 * BATCH,
        micro_batch_size=BATCH // 2,  # so that two ranks can share a step
    ),
    guidance=1.5,
    guidance_range=Range(1.0, 2.5),
)

FAST = dataclasses.replace(
    DEFAULT,
    name="digits_fast",
    base=base_training(800),
    num_synthetic=500,
    num_evaluate=500,
    ranking_images=250,
    curve=(1.0, 2.0),
    feature_steps=200,
    judged=False,
)
