#!/usr/bin/env python3
"""Images -> moments of their latents, in the official zip, which imm/finetune.py reads like the images themselves.

python imm/encode.py --source datasets/imm256/ns30k --dest datasets/imm256/ns30k.zip
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm and the floors, without installing

from neon_run.start import imported

if __name__ == "__main__":
    imported("neon_imm.encode").main()
