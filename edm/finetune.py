#!/usr/bin/env python3
"""Fine-tune the base network briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    python edm/finetune.py --preset cifar10_cond --data datasets/cifar10/ns6k --outdir training-runs/cifar10/ns6k
    torchrun --standalone --nproc_per_node=8 edm/finetune.py --preset ffhq64 --data S --transfer base.pkl --outdir run

A killed run is continued by the same command, on any number of processes that divides the work. Then: edm/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("finetune", "neon_edm")
