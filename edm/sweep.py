#!/usr/bin/env python3
"""Find w: the FID of theta_base - w (theta_syn - theta_base) over the snapshots of a fine-tune and a list of w.

    python edm/sweep.py --preset cifar10_cond --snapshots training-runs/cifar10/ns6k --out_dir sweeps/cifar10
    torchrun --standalone --nproc_per_node=8 edm/sweep.py --base base.pkl --snapshots run --ref ref.npz --out_dir sweep

All points share their noise. Finished points are kept: repeat the command to go on. The best point is evaluated
again on --seeds and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("sweep", "neon_edm")
