#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, in one process per GPU.

    torchrun --standalone --nproc_per_node=8 imm/sweep.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --snapshots training-runs/imm256/ns30k --num_steps 8 --out_dir sweeps/imm256

Networks are loaded once and moved in place; all points share their seeds. Finished points are kept: repeat the command
to go on. The best point is evaluated again on --final_images and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("sweep", "neon_imm")
