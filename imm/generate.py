#!/usr/bin/env python3
"""Write the synthetic set S: images of the base with its own sampler, lossless, with labels and a manifest.

    torchrun --standalone --nproc_per_node=8 imm/generate.py --network checkpoints/imagenet256_ts_a2.pkl \\
        --outdir datasets/imm256/ns30k

A killed run is continued by the same command, on any number of processes. Then: imm/finetune.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("generate", "neon_imm")
