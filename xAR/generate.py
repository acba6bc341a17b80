#!/usr/bin/env python3
"""Draw the synthetic set S from a base checkpoint: PNG images with their labels, in EDM's data-set layout.

    torchrun --standalone --nproc_per_node=8 xAR/generate.py --model xar_large --outdir syn/xarl

Settings left out are the paper's for the row. Classes are balanced to within one image for any number of images. A
killed run is continued by the same command, on any number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("generate", "neon_xar")
