#!/usr/bin/env python3
"""Neon on real images in minutes, without a GPU or a network: base -> synthetic set -> self-trained -> Neon.

    python edm/quickstart.py                    three seeds, about four minutes on two cores
    python edm/quickstart.py --fast             one small run, under a minute: does everything work?

Prints a table and writes quickstart.png, quickstart_curve.png and results.json; each seed's folder is that of a
`neon reproduce edm/digits`, with report.html, neon.safetensors and the files of all stages. Ends with status 1 if the
distances do not show the effect. Seeds that an earlier run finished are kept.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

from neon_run.start import imported

if __name__ == "__main__":
    imported("neon_edm.quickstart.command").main()
