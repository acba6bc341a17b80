"""One row."""

from neon_core.backbone import TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_fifth.backbone import FifthBackbone
from neon_run.row import Grid, Range, Row

ROWS = (
    Row(
        id="fifth/tiny",
        backbone=FifthBackbone,
        base="tiny.safetensors",
        fid_stats="tiny.npz",
        num_synthetic=40,
        generate={"contrast": 1.0},
        train=TrainSettings(
            images=160, batch_size=8, micro_batch_size=2, lr=1e-2, schedule=LinearRamp(40), ema=Ema(decay=0.9),
            snapshot_images=80,
        ),
        w=1.0,
        evaluate={"contrast": 1.0},
        evaluate_seeds="1000-1199",
        batch_size=16,
        grid=Grid((0.0, 1.0, 2.0), {"contrast": (0.8, 1.0, 1.2)}, num_images=60),
        axes={"contrast": Range(0.5, 1.5)},
        evaluations=lambda settings: 1,
    ),
)  # fmt: skip
