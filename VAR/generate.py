#!/usr/bin/env python3
"""Draw the synthetic set S from the base VAR: PNG images with their labels.

    torchrun --standalone --nproc_per_node=8 VAR/generate.py --preset imagenet_256 --outdir datasets/var256/ns750k
    python VAR/generate.py --var_ckpt base.safetensors --vae_ckpt vae.safetensors --num_images 1000 --outdir S

A killed run is continued by the same command, on any number of processes. Every 1000 consecutive seeds hold every
class once.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_var and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("generate", "neon_var")
