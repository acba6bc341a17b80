"""Script for the tests: one stage of the method with the pico backbone, under any number of ranks.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/core/pico_run.py generate OUT

`fail`: the set is made, then rank 0 fails in work of its own; `user_error`: rank 1 fails while the others wait for it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 2)]

import click
import torch
from pico import SETTINGS, TRAIN, PicoBackbone, PixelMoments

from neon_core.distributed import on_rank_0, print0, rank, session
from neon_core.finetune import open_set
from neon_core.pixels import check_finite
from neon_core.prepared import training_data
from neon_core.selftrain import self_train
from neon_core.synthetic import generate_set
from neon_files.errors import UserError
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.evaluate import evaluate
from neon_metrics.kept import KeptWork
from neon_run.cli import run


class SlowPico(PicoBackbone):
    """Waits at every step, so that a test can kill the run in its middle. PICO_STOP "1:20": rank 1 (all: "") sends
    itself SIGTERM at the 20th. PICO_NAN "7": seed 7 gives NaN."""

    pause = float(os.environ.get("PICO_PAUSE", 0))
    stop = os.environ.get("PICO_STOP", ":0")
    nan = os.environ.get("PICO_NAN", "")
    count = 0

    def wait(self):
        SlowPico.count += 1
        who, when = self.stop.split(":")
        if who in ("", str(rank())) and SlowPico.count == int(when):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.pause)

    def sample(self, seeds, *args, **kwargs):
        self.wait()
        check_finite(torch.tensor([[float("nan") if str(seed) == self.nan else 0.0] for seed in seeds]))
        return super().sample(seeds, *args, **kwargs)

    def encode(self, *args):
        self.wait()
        return super().encode(*args)


def breaks():
    raise RuntimeError("rank zero breaks")


@click.command()
@click.argument("stage", type=click.Choice(["generate", "finetune", "evaluate", "fail", "user_error", "all"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--num", default=41)
@click.option("--batch", default=4)
@click.option("--save_seconds", default=30.0)
@click.option("--mode", default="ddp")
@click.option("--checkpointing", is_flag=True)
def main(stage, out, num, batch, save_seconds, mode, checkpointing):
    torch.set_num_threads(1)
    backbone = SlowPico.fresh(seed=3)
    with session("cpu") as device:
        if stage not in ("finetune", "evaluate"):
            generate_set(backbone, range(num), out / "set", settings=SETTINGS, batch_size=batch)
        if stage == "fail":
            on_rank_0(breaks)
        if stage == "user_error" and rank() == 1:
            raise UserError("--flag 7: not what was expected; use 8")
        if stage == "user_error":
            torch.distributed.barrier()
        if stage in ("finetune", "all"):
            data = training_data(backbone, open_set(os.environ.get(f"PICO_SET_{rank()}", out / "set")), device)
            self_train(backbone, data, TRAIN, out / "run", seed=5, device=device, mode=mode,
                       activation_checkpointing=checkpointing)  # fmt: skip
        if stage in ("evaluate", "all"):
            make = lambda: MetricAccumulator(PixelMoments(), num, ("fid", "is"))  # noqa: E731
            kept = KeptWork(out / "eval", {})
            done = evaluate(SlowPico.fresh(seed=3), range(num), make, settings=SETTINGS, batch_size=batch,
                            kept=kept, save_seconds=save_seconds)  # fmt: skip
            statistics = done.feature_statistics
            score = torch.tensor(done.inception_score.score(), dtype=torch.float64)
            saved = {"mean": statistics.mean, "cov": statistics.covariance(), "is": score}
            torch.save(saved, out / f"stats-{rank()}.pt")
            kept.clear()
        print0(json.dumps({"rank_0_done": stage}))


if __name__ == "__main__":
    run(main)
