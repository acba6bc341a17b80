#!/usr/bin/env python3
"""FID of VAR at 512 x 512.

    PYTHONPATH=VAR/VAR_imagenet_512 torchrun --standalone --nproc_per_node=8 VAR/VAR_imagenet_512/calculate_fid.py \\
        --var_ckpt checkpoints/Neon_VARd36_imagenet512.pth --num_images 50000 --batch_size 32 --img_size 512 \\
        --fid_stats fid_stats/adm_in512_stats.npz
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # neon_var and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("calculate_fid", "neon_var", preset="imagenet_512")
