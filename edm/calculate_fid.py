#!/usr/bin/env python3
"""FID of a network's images; nothing is written but the result line (and --json).

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz --seeds 0-49999 --num_steps 40

Also without torchrun, in one process. Every seed counts once, whatever the number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("calculate_fid", "neon_edm")
