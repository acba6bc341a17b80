"""The three rows of the paper's table that use EDM (section 4 of the paper, run_cifar10.sh and run_ffhq.sh).

No w is stated for the CIFAR-10 rows, and a range for FFHQ; the values here are starting points. `sweep.py` finds the
best w of a fine-tune: it scales like 1 / (lr x steps), so it belongs to its snapshot. The official runs are longer
than the paper's best budgets (3.5 and 1.7 million images), which lie among their snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from neon_core.backbone import Recipe, TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_edm import official

PRETRAINED = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
FID_REFS = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"


@dataclass(frozen=True)
class EDMRecipe(Recipe):
    """A row, with what only EDM's training knows."""

    augment: float = 0.0  # probability of each augmentation; 0: none
    dropout: float | None = None  # None: as the checkpoint has it
    tick_images: int = 50_000
    snapshot_ticks: int = 10  # a snapshot after the first tick and then after every so many

    def with_settings(self, augment: float | None = None, dropout: float | None = None, **settings: Any) -> EDMRecipe:
        """The same row with other training settings: those of `train_settings` that are not None."""
        train = self.train
        now = {
            "images": train.images,
            "batch_size": train.batch_size,
            "micro_batch_size": train.micro_batch_size,
            "lr": train.lr,
            "ema_images": train.ema.halflife_images,
            "precision": train.precision,
            "tick_images": self.tick_images,
            "snapshot_ticks": self.snapshot_ticks,
        } | {name: value for name, value in settings.items() if value is not None}
        return replace(
            self,
            train=train_settings(**now),
            augment=self.augment if augment is None else augment,
            dropout=self.dropout if dropout is None else dropout,
            tick_images=now["tick_images"],
            snapshot_ticks=now["snapshot_ticks"],
        )


def train_settings(
    *,
    images: int,
    batch_size: int,
    micro_batch_size: int,
    lr: float,
    ema_images: int = 500_000,
    precision: str = "fp32",
    tick_images: int = 50_000,
    snapshot_ticks: int = 10,
) -> TrainSettings:
    """The official training loop: lr from 0 towards `lr` over 10 million images (a run ends before it gets there),
    Adam, gradients that are not finite replaced, EMA with a half-life of `ema_images`, snapshots at whole ticks."""
    return TrainSettings(
        images=images,
        batch_size=batch_size,
        micro_batch_size=min(micro_batch_size, batch_size),
        lr=lr,
        schedule=LinearRamp(official.LR_RAMP_IMAGES),
        optimizer="adam",
        betas=(0.9, 0.999),
        eps=1e-8,
        nonfinite_gradients="zero",
        ema=Ema(halflife_images=ema_images),
        precision=precision,
        snapshot_images=tuple(official.snapshot_images(images, batch_size, tick_images, snapshot_ticks)[0]),
    )


CIFAR10_TRAIN = train_settings(images=6_000_000, batch_size=512, micro_batch_size=64, lr=1e-4)
FFHQ_TRAIN = train_settings(images=3_000_000, batch_size=256, micro_batch_size=32, lr=4e-6, snapshot_ticks=5)
CIFAR10_REF = f"{FID_REFS}/cifar10-32x32.npz"
FFHQ_REF = f"{FID_REFS}/ffhq-64x64.npz"
COND_BASE, UNCOND_BASE, FFHQ_BASE = (
    f"{PRETRAINED}/edm-{name}-vp.pkl" for name in ("cifar10-32x32-cond", "cifar10-32x32-uncond", "ffhq-64x64-uncond")
)


def row(name, num_synthetic, num_steps, train, w, fid_stats, base, evaluate_seeds, **settings: Any) -> EDMRecipe:
    """S and the evaluation use the same sampler: `num_steps` of Heun, no churn."""
    sampler = {"num_steps": num_steps}
    return EDMRecipe(name, num_synthetic, sampler, train, w, sampler, fid_stats, base, evaluate_seeds, **settings)


def w_grid(name: str | None) -> tuple[float, ...]:
    """The official merge weights of the search for a row."""
    return tuple(0.25 * i for i in range(13 if name == "ffhq64" else 9))  # to 3 for FFHQ, to 2 for CIFAR-10


# fmt: off
RECIPES: dict[str, EDMRecipe] = {r.name: r for r in (
    row("cifar10_cond",    6_000, 18, CIFAR10_TRAIN, 1.0,  CIFAR10_REF, COND_BASE,   "50000-99999",
        augment=0.12, dropout=0.13),                    # FID 1.78 -> 1.38; w not stated
    row("cifar10_uncond",  6_000, 18, CIFAR10_TRAIN, 1.0,  CIFAR10_REF, UNCOND_BASE, "50000-99999",
        augment=0.12, dropout=0.13),                    # FID 1.97 -> 1.38; w not stated, no script published
    row("ffhq64",         18_000, 40, FFHQ_TRAIN,    1.25, FFHQ_REF,    FFHQ_BASE,   "500000-549999",
        augment=0.15, dropout=0.05, snapshot_ticks=5),  # FID 2.39 -> 1.12; w between 1.0 and 1.5
)}
# fmt: on
