"""A row for the tests: the pico backbone, its base and its reference, all made here in a second."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path

import torch
from core.pico import NUM_SYNTHETIC, SETTINGS, TRAIN, PicoBackbone, PicoNet, PixelMoments

from neon_core.merge import NeonWeights
from neon_core.prepared import training_data
from neon_core.selftrain import self_train
from neon_core.synthetic import generate_set
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.image_set import ImageSet
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.evaluate import evaluate
from neon_metrics.reference import Reference, write_reference
from neon_run.reproduce.reproduction import Plan
from neon_run.row import Grid, Range, Row

CPU = torch.device("cpu")
TRUE_W, TRUE_CONTRAST = 1.0, 1.1


class SlowPico(PicoBackbone):
    """Loads its checkpoint. Goes no further where PICO_HANG says, so that a test can kill the run there:
    "PATTERN:COUNT", as soon as so many files are there; ":COUNT", at this call."""

    hang = os.environ.get("PICO_HANG", ":0")
    calls = 0

    @classmethod
    def load(cls, checkpoint, device):
        read = read_checkpoint(checkpoint)
        net = PicoNet(**read.config["kwargs"])
        load_strict(net, read)
        return cls(net.eval().requires_grad_(False), device)

    def sample(self, *args, **settings):
        self._step()
        return super().sample(*args, **settings)

    def encode(self, *args):
        self._step()
        return super().encode(*args)

    def _step(self):
        SlowPico.calls += 1
        pattern, count = self.hang.rsplit(":", 1)
        if 0 < int(count) <= (len(glob.glob(pattern)) if pattern else SlowPico.calls):
            time.sleep(600)


def make_files(folder: Path) -> None:
    """base.safetensors, and statistics of "real" images that Neon can reach: those of theta_base - (theta_syn -
    theta_base) at contrast 1.1, theta_syn being the first snapshot of the row's own fine-tune."""
    base = PicoBackbone.fresh(seed=3)
    write_checkpoint(folder / "base.safetensors", base.net.state_dict(), config=base.network_config())
    theta_base = {name: value.clone() for name, value in base.net.state_dict().items()}
    generate_set(base, range(NUM_SYNTHETIC), folder / "set", settings=SETTINGS, batch_size=16)
    snapshots = self_train(base, training_data(base, ImageSet(folder / "set"), CPU), TRAIN, folder, device=CPU)
    true = PicoBackbone.fresh(seed=3)
    NeonWeights(true.net, theta_base, read_checkpoint(snapshots[80]).state).set(TRUE_W)
    make = lambda: MetricAccumulator(PixelMoments(), 2000, ("fid",))  # noqa: E731
    settings = {"contrast": TRUE_CONTRAST}
    real = evaluate(true, range(10_000, 12_000), make, settings=settings, batch_size=100, progress=False)
    write_reference(folder / "pico.npz", Reference.from_statistics(real.feature_statistics))


def pico_row(folder: Path, guided: bool = True) -> Row:
    """Guidance is the contrast of the images."""
    return Row(
        id="pico/pico",
        backbone=SlowPico,
        base=str(folder / "base.safetensors"),
        fid_stats=str(folder / "pico.npz"),
        num_synthetic=NUM_SYNTHETIC,
        generate=SETTINGS,
        train=TRAIN,
        w=1.0,
        evaluate=SETTINGS,
        evaluate_seeds="1000-1199",
        batch_size=16,
        w_range=(0.0, 3.0),
        grid=Grid((0.0, 1.0, 2.0), {"contrast": (0.8, 1.0, 1.2)} if guided else {}, num_images=60),
        base_fid=2.0,
        neon_fid=1.0,
        axes={"contrast": Range(0.5, 1.5)} if guided else {},
        evaluations=lambda settings: 1,
    )


PLAN = Plan(detector=PixelMoments(), ranking_images=40, deciding_images=80, resamples=10)
