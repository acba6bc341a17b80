#!/usr/bin/env python3
"""Fine-tune the base VAR briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 VAR/finetune.py --preset imagenet_256 --data datasets/var256/ns750k \\
        --outdir training-runs/var256/ns750k
    torchrun --standalone --nproc_per_node=8 VAR/finetune.py --preset imagenet_512 --data datasets/var512/ns90k \\
        --outdir training-runs/var512/ns90k --parallel fsdp --activation_checkpointing --precision bf16

A killed run is continued by the same command, on any number of processes. Then: VAR/sweep.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("finetune", "neon_var")
