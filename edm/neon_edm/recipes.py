"""The three rows of the paper's table that use EDM (section 4 of the paper, run_cifar10.sh and run_ffhq.sh).

No w is stated for the CIFAR-10 rows, and a range for FFHQ; the values here are starting points, `sweep.py` finds the
best w of a fine-tune (it scales like 1 / (lr x steps), so it belongs to its snapshot). The official runs are longer than
the paper's best budgets (3.5 and 1.7 million images), which lie among their snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def train_settings(
    *,
    millions: float,
    batch_size: int,
    micro_batch_size: int,
    lr: float,
    ema_millions: float = 0.5,
    tick_images: int = 50_000,
    snapshot_ticks: int = 10,
) -> TrainSettings:
    """The official training loop: lr from 0 towards `lr` over 10 million images (a run ends before it gets there),
    Adam, gradients that are not finite replaced, EMA by half-life, snapshots at whole ticks."""
    duration = official.duration_images(millions)
    return TrainSettings(
        images=duration,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        schedule=LinearRamp(official.LR_RAMP_IMAGES),
        optimizer="adam",
        betas=(0.9, 0.999),
        eps=1e-8,
        nonfinite_gradients="zero",
        ema=Ema(halflife_images=official.kimg(ema_millions)),
        snapshot_images=tuple(official.snapshot_images(duration, batch_size, tick_images, snapshot_ticks)[0]),
    )


CIFAR10_TRAIN = train_settings(millions=6, batch_size=512, micro_batch_size=64, lr=1e-4)
FFHQ_TRAIN = train_settings(millions=3, batch_size=256, micro_batch_size=32, lr=4e-6, snapshot_ticks=5)

# fmt: off
RECIPES: dict[str, EDMRecipe] = {
    recipe.name: recipe
    for recipe in (
        EDMRecipe("cifar10_cond",   6_000,  {"num_steps": 18}, CIFAR10_TRAIN, 1.0,  {"num_steps": 18},
                  f"{FID_REFS}/cifar10-32x32.npz", f"{PRETRAINED}/edm-cifar10-32x32-cond-vp.pkl",
                  "50000-99999",   augment=0.12, dropout=0.13),    # FID 1.78 -> 1.38; w not stated
        EDMRecipe("cifar10_uncond", 6_000,  {"num_steps": 18}, CIFAR10_TRAIN, 1.0,  {"num_steps": 18},
                  f"{FID_REFS}/cifar10-32x32.npz", f"{PRETRAINED}/edm-cifar10-32x32-uncond-vp.pkl",
                  "50000-99999",   augment=0.12, dropout=0.13),    # FID 1.97 -> 1.38; no script published, w not stated
        EDMRecipe("ffhq64",         18_000, {"num_steps": 40}, FFHQ_TRAIN,    1.25, {"num_steps": 40},
                  f"{FID_REFS}/ffhq-64x64.npz",    f"{PRETRAINED}/edm-ffhq-64x64-uncond-vp.pkl",
                  "500000-549999", augment=0.15, dropout=0.05),    # FID 2.39 -> 1.12 at w between 1.0 and 1.5
    )
}
# fmt: on
