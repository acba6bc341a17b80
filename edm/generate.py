#!/usr/bin/env python3
"""Draw the synthetic set S from the base network: PNG images with their labels, in EDM's data-set layout.

    python edm/generate.py --preset cifar10_cond --outdir datasets/cifar10/ns6k
    torchrun --standalone --nproc_per_node=8 edm/generate.py --network base.pkl --seeds 0-17999 --steps 40 --outdir S

A killed run is continued by the same command. Conditional networks get a random class for each image.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("generate", "neon_edm")
