"""Script for the tests: the whole pipeline with the pico row, under any number of ranks.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/core/pico_reproduce.py FILES OUT
"""
# ruff: noqa: E402  (the path comes first, as in every script)

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import click
import torch
from core.pico_rows import PLAN, pico_row

from neon_core.distributed import print0, session
from neon_run.cli import run
from neon_run.reproduce.reproduction import Reproduction


@click.command()
@click.argument("files", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(files, out):
    torch.set_num_threads(1)
    with session("cpu") as device:
        results = Reproduction(pico_row(files), out, PLAN, device).run()
        print0(json.dumps(results["intervals"]))


if __name__ == "__main__":
    run(main)
