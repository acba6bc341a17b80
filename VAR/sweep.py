#!/usr/bin/env python3
"""Find snapshot, w and guidance: FID of theta_base - w (theta_syn - theta_base) over a grid, in one process per GPU.

    torchrun --standalone --nproc_per_node=8 VAR/sweep.py --preset imagenet_256 \\
        --snapshots training-runs/var256/ns750k --w 0.4,0.8,1.0,1.2 --cfg 2.4,2.6,2.8,3.0 --out_dir sweeps/var256

The network is loaded once and moved in place; all points share their seeds. Finished points are kept: repeat the
command to go on. The best point is evaluated on other seeds and its network written to <out_dir>/neon.safetensors.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("sweep", "neon_var")
