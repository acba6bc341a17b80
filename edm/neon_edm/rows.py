"""The three rows of the paper's table that use EDM (section 4 of the paper, run_cifar10.sh and run_ffhq.sh), the digits
and Fashion-MNIST.

No w is stated for the CIFAR-10 rows, and a range for FFHQ; the values here are starting points. `sweep.py` finds the
best w of a fine-tune: it scales like 1 / (lr x steps), so it belongs to its snapshot. The official runs are longer
than the paper's best budgets (3.5 and 1.7 million images), which lie among their snapshots.
"""

from __future__ import annotations

from typing import Any

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_edm import official
from neon_edm.backbone import EDMBackbone
from neon_edm.fashion import FASHION
from neon_edm.quickstart.settings import DEFAULT, GUIDED
from neon_run.row import Grid, Row

PRETRAINED = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
FID_REFS = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"
TICK_IMAGES = 50_000  # of the official training loop, which leaves snapshots after whole ticks
SNAPSHOT_TICKS = {"ffhq64": 5}  # between two snapshots of a row; else 10


def train_settings(
    *,
    images: int,
    batch_size: int,
    micro_batch_size: int,
    lr: float,
    snapshot_ticks: int = 10,
) -> TrainSettings:
    """The official training loop: lr from 0 towards `lr` over 10 million images (a run ends before it gets there),
    Adam, gradients that are not finite replaced, EMA with a half-life of 500,000 images, snapshots at whole ticks."""
    return TrainSettings(
        images=images,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        schedule=LinearRamp(official.LR_RAMP_IMAGES),
        optimizer="adam",
        betas=(0.9, 0.999),
        eps=1e-8,
        nonfinite_gradients="zero",
        ema=Ema(halflife_images=500_000),
        snapshot_images=tuple(official.snapshot_images(images, batch_size, TICK_IMAGES, snapshot_ticks)[0]),
    )


def _row(name: str, num_steps: int, w_max: float, **fields: Any) -> Row:
    """S and the evaluation use the same sampler: `num_steps` of Heun, no churn; 2 N - 1 network calls."""
    return Row(
        id=f"edm/{name}",
        backbone=EDMBackbone,
        generate={"num_steps": num_steps},
        evaluate={"num_steps": num_steps},
        subfolders=False,
        tf32="conv",  # PyTorch's default, which the official sampling scripts leave; the training loop switches it off
        grid=Grid(tuple(0.25 * i for i in range(round(4 * w_max) + 1)), first_images=51_000, last_images=10_000_000),
        w_range=(0.0, 3.0),
        evaluations=lambda settings: 2 * settings["num_steps"] - 1,
        **fields,
    )


CIFAR10_TRAIN = train_settings(images=6_000_000, batch_size=512, micro_batch_size=64, lr=1e-4)
FFHQ_TRAIN = train_settings(
    images=3_000_000, batch_size=256, micro_batch_size=32, lr=4e-6, snapshot_ticks=SNAPSHOT_TICKS["ffhq64"]
)
CIFAR10 = {
    "num_synthetic": 6_000,
    "train": CIFAR10_TRAIN,
    "w": 1.0,  # not stated
    "fid_stats": f"{FID_REFS}/cifar10-32x32.npz",
    "evaluate_seeds": "50000-99999",
    "load_training": {"augment": 0.12, "dropout": 0.13},
}

ROWS = (
    _row(
        "cifar10_cond", 18, 2.0, base=f"{PRETRAINED}/edm-cifar10-32x32-cond-vp.pkl", base_fid=1.78, neon_fid=1.38,
        aliases=("edm-cifar10-cond",), **CIFAR10,
    ),
    # No script is published for this one. The original repository's README has 1.98 for the base.
    _row(
        "cifar10_uncond", 18, 2.0, base=f"{PRETRAINED}/edm-cifar10-32x32-uncond-vp.pkl", base_fid=1.97, neon_fid=1.38,
        aliases=("edm-cifar10-uncond",), **CIFAR10,
    ),
    _row(
        "ffhq64", 40, 3.0, base=f"{PRETRAINED}/edm-ffhq-64x64-uncond-vp.pkl", base_fid=2.39, neon_fid=1.12,
        aliases=("edm-ffhq",),
        num_synthetic=18_000,
        train=FFHQ_TRAIN,
        w=1.25,  # between 1.0 and 1.5
        fid_stats=f"{FID_REFS}/ffhq-64x64.npz",
        evaluate_seeds="500000-549999",
        load_training={"augment": 0.15, "dropout": 0.05},
    ),
    DEFAULT.row(),
    GUIDED.row(),
    FASHION,
)  # fmt: skip

# Any other network, without --preset: the official scripts' defaults. Base and reference must be named.
ANY_NETWORK = _row(
    "network", 18, 2.0, num_synthetic=64, train=CIFAR10_TRAIN, w=1.0, evaluate_seeds="0-9999",
)  # fmt: skip
