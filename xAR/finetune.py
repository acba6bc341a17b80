#!/usr/bin/env python3
"""Fine-tune the base briefly on its own images: theta_base, S -> theta_syn, in snapshots.

    torchrun --standalone --nproc_per_node=8 xAR/finetune.py --model xar_large --data syn/xarl --outdir runs/xarl

Settings left out are the paper's for the row. The autoencoder sees every image once; its moments are kept beside the
set. A killed run is continued by the same command, on any number of processes that divides the work.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar and the floors, without installing

from neon_run.start import run_stage

if __name__ == "__main__":
    run_stage("finetune", "neon_xar")
