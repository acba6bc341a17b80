#!/usr/bin/env python3
"""FID and IS of an IMM checkpoint; nothing is written but the result line (and --json).

    PYTHONPATH=imm torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py \\
        --model_ckpt checkpoints/Neon_IMM_imagenet256.pth --num_images 50000 --batch_size 64 --img_size 256 \\
        --fid_stats fid_stats/adm_in256_stats.npz

With --synthetic and --w, of theta_base - w (theta_syn - theta_base). The official script's key=value pairs work too.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("calculate_fid", "neon_imm")
