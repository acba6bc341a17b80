#!/usr/bin/env python3
"""FID and IS of an xAR checkpoint; images stay in memory, one result line comes out (and --json).

    PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model xar_large \\
        --model_ckpt checkpoints/Neon_xARL_imagenet256.pth --cfg 2.7 --vae_path xAR/pretrained/kl16.ckpt \\
        --num_images 50000 --batch_size 64 --flow_steps 50 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

Without --cfg and --flow_steps: the paper's settings of the row (xar_large 2.7 and 50, xar_base 3.8 and 40). Every image
counts once, whatever the number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("calculate_fid", "neon_xar")
