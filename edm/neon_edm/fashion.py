"""The row `edm/fashion`: Fashion-MNIST with a small perceptron in EDM's preconditioner, its sampler and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon_core.backbone import Backbone
from neon_core.schedules import Ema
from neon_edm.guidance import GuidedBackbone, passes_per_image
from neon_run.fashion.data import IMG_SIZE, NUM_CLASSES, Fashion
from neon_run.fashion.prepare import PrepareFashion
from neon_run.fashion.rows import fashion_row, training
from neon_run.row import Acceptance, Range

NO_SNAPSHOTS = 1 << 60  # but the last
# Few steps, whose levels lie where they matter for eight grey bits at this size: between 0.02 and 40.
SAMPLER = {"num_steps": 8, "sigma_min": 0.02, "sigma_max": 40.0, "rho": 5.0}
NETWORK: dict[str, Any] = {  # the arguments of EDMPrecond and, after model_type, of the perceptron
    "img_resolution": IMG_SIZE,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "sigma_data": 0.63,  # the images' standard deviation
    "model_type": "PixelPerceptron",
    "width": 384,
    "label_dropout": 0.1,
}


class FashionBackbone(GuidedBackbone):
    """Pixels are kept in an array beside the set: half of the time of a step would go into decoding PNGs."""

    prepared_key = "pixels"


@dataclass(frozen=True)
class PrepareEDM(PrepareFashion):
    """The base: a network of `width`."""

    width: int = NETWORK["width"]

    def create(self, folder: Path, fashion: Fashion, seed: int) -> tuple[Backbone, dict[str, Path]]:
        return FashionBackbone.fresh({**NETWORK, "width": self.width}, seed), {}


# Real images -> theta_base: briefly, so that there is something left to repair.
BASE = training(4_000, 100, 1e-3, Ema(decay=0.998, warmup_steps=10), snapshot_images=NO_SNAPSHOTS)
FINE_TUNE = training(50, 20, 1.5e-4, Ema(decay=0.99, warmup_steps=10), snapshot_images=NO_SNAPSHOTS)

FASHION = fashion_row(
    "edm/fashion",
    FashionBackbone,
    PrepareEDM(BASE),
    Acceptance(neon=0.6, self_trained=1.5, controls=0.94),  # training seed 0 gave 0.32, 2.7 and 1.05
    num_synthetic=6_000,
    generate={**SAMPLER, "guidance": 1.5},
    train=FINE_TUNE,
    w=1.0,  # where the search begins
    evaluate={**SAMPLER, "guidance": 2.0},
    batch_size=500,
    w_range=(0.0, 3.0),
    axes={"guidance": Range(1.0, 4.0)},
    evaluations=passes_per_image,
)
