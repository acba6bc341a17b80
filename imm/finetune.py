#!/usr/bin/env python3
"""Fine-tune the base IMM briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 imm/finetune.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --data datasets/imm256/ns30k --outdir training-runs/imm256/ns30k

--data holds images, whose moments are then made once and kept beside them, or is the zip of moments of imm/encode.py.
A killed run is continued by the same command, on any number of processes that divides the work. Then: imm/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("finetune", "neon_imm")
