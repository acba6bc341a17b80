#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, weights moved in place.

    torchrun --standalone --nproc_per_node=8 xAR/sweep.py --model xar_large --snapshots runs/xarl --out_dir sweeps/xarl

Grids and early stop left out are the official ones of the row. All points share their seeds; finished points are kept,
so that the same command goes on after a kill. The best one is written as <out_dir>/neon.safetensors and, with --final,
evaluated with 50,000 other seeds.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("sweep", "neon_xar")
