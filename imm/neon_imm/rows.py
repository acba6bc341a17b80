"""The rows of the paper's table that use IMM: one fine-tune, evaluated with 8, 4, 2 or 1 steps.

Sources: arXiv 2510.03597 v3 and the official training configuration (`imagenet256_a2b4k12_mingap0.0001_fp16`). The
paper states w and guidance for 8 steps only; for fewer steps `sweep.py` has to find them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema
from neon_imm.backbone import IMMBackbone
from neon_imm.fashion import FASHION
from neon_imm.loss import IMMLoss
from neon_imm.sampler import PRESETS, passes_per_image
from neon_run.row import Grid, Range, Row

TICK = 102_400  # images between two official snapshots

# The configuration of the published ImageNet models, for files that are bare state dicts.
IMAGENET_NETWORK: dict[str, Any] = {
    "img_resolution": 32,
    "img_channels": 4,
    "label_dim": 1000,
    "model_type": "DiT_XL_2",
    "noise_schedule": "fm",
    "f_type": "euler_fm",
    "temb_type": "stride",
    "sigma_data": 0.5,
    "eps": 0.0,
    "T": 0.994,
    "time_scale": 1000,
}
CIFAR_NETWORK: dict[str, Any] = {
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "dropout": 0.2,
    "noise_schedule": "fm",
    "f_type": "simple_edm",
    "temb_type": "identity",
    "eps": 0.006,
    "T": 0.994,
    "time_scale": 1000,
}

IMAGENET_TRAIN = TrainSettings(
    images=19 * TICK,  # the paper's best length, 1.95 million; the official run is 60 ticks long
    batch_size=512,
    micro_batch_size=64,  # of each of 8 GPUs
    lr=1e-6,
    optimizer="adamw",
    ema=Ema(decay=0.9999),
    precision="fp16",
    nonfinite_gradients="step",  # the gradient scaler skips such a step
    snapshot_images=TICK,
)


def w_grid(num_steps: int | None) -> tuple[float, ...]:
    """The official merge weights of the search, by number of steps."""
    few = {1: (0.0, 0.2, 0.4), 2: (0.4,)}.get(num_steps or 0, ())
    return (*few, *(round(0.4 * i, 1) for i in range(2, 14)))


def cfg_grid(num_steps: int | None) -> tuple[float, ...]:
    """The official guidance scales of the search."""
    return (*((1.3, 1.4, 1.5) if num_steps == 1 else ()), 1.6, 1.7, 1.8, 2.2, 2.6)


def _row(name: str, **fields: Any) -> Row:
    """The settings common to the rows: TF32 while sampling and full float32 in the fine-tune, as officially."""
    return Row(
        id=f"imm/{name}",
        backbone=IMMBackbone,
        num_synthetic=30_000,
        micro_batch_multiple=4,
        tf32="all",
        w_range=(0.0, 5.0),
        evaluations=passes_per_image,
        **fields,
    )


def _imagenet(name: str, num_steps: int, **fields: Any) -> Row:
    # The guidance 1.8 as recorded by the authors; their presets have 1.5. Labels go with the seed: the official rule
    # ties a class to the length of the list, which a search varies.
    return _row(
        name,
        base="checkpoints/imagenet256_ts_a2.pkl",
        fid_stats="fid_stats/adm_in256_stats.npz",
        load={"network": IMAGENET_NETWORK, "loss": IMMLoss(sample_t_mode="uniform", min_tr_gap=1e-4)},
        generate={"num_steps": 8, "cfg": 1.5},
        train=IMAGENET_TRAIN,
        w=3.6,
        evaluate={"num_steps": num_steps, "cfg": 1.8, "label_rule": "balanced"},
        grid=Grid(w_grid(num_steps), {"cfg": cfg_grid(num_steps)}),
        axes={"cfg": Range(1.0, 3.0)},
        **fields,
    )


ROWS = (
    _imagenet("imagenet_256", 8, base_fid=1.99, neon_fid=1.46),
    _imagenet("imagenet_256_t4", 4, neon_fid=1.69),
    _imagenet("imagenet_256_t2", 2, neon_fid=2.89),
    _imagenet("imagenet_256_t1", 1, base_fid=7.77, neon_fid=6.67),
    # IMM's pixel-space model. The paper has no row for it: the training settings are those of its base, shortened.
    _row(
        "cifar10",
        base="checkpoints/cifar10.pt",
        fid_stats="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
        load={
            "network": CIFAR_NETWORK,
            "latent": False,
            "loss": IMMLoss(sample_t_mode="uniform", a=1, k=15),
        },
        generate={"discretization": "mid_nt", "mid_nt": (1.4,), "cfg": None},
        train=TrainSettings(
            images=2_048_000,
            batch_size=4096,
            micro_batch_size=512,
            lr=1e-5,  # a tenth of the base's 1e-4
            optimizer="radam",
            ema=Ema(decay=0.9999),
            nonfinite_gradients="step",
            snapshot_images=204_800,
        ),
        w=1.0,
        evaluate={"discretization": "mid_nt", "mid_nt": (1.4,), "cfg": None},
        grid=Grid(w_grid(None)),
    ),
    FASHION,
)
_BY_NAME = {row.name: row for row in ROWS}


def official_presets() -> dict[str, Row]:
    """The official names of sampler settings, each as the row that they belong to with these settings."""
    rows = {}
    for name, settings in PRESETS.items():
        row = _BY_NAME["cifar10" if settings["cfg"] is None else "imagenet_256"]
        kept = {key: value for key, value in row.evaluate.items() if key == "label_rule"}
        rows[name] = replace(row, generate=settings, evaluate={**settings, **kept})
    return rows
