"""The table of docs/improve.md: `improve` on a flow-matching MLP (tests/core/discs.py), three training seeds.

python benchmarks/improve.py OUT    some minutes on one core; the same command continues
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from core.discs import DETECTOR, Flow, discs, loss, sample, trained

from neon_core.seeds import global_batches
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_metrics import FeatureStatistics, Reference, fid, write_reference
from neon_run import improve

STEPS, TWICE = 12_000, 24_000  # of training, batches of 256
FRESH = 1_005_000  # where the seeds begin on which `improve` reports


def kept(path: Path, seed: int, steps: int) -> Flow:
    """The network trained so long, from its file where that is there."""
    if not path.exists():
        write_checkpoint(path, trained(seed, steps).state_dict())
    net = Flow()
    load_strict(net, read_checkpoint(path))
    return net


@torch.no_grad()
def distance(net: Flow, reference: Reference, steps: int) -> float:
    """Of 5,000 images of the fresh seeds, with so many solver steps."""
    statistics = FeatureStatistics(DETECTOR.num_features)
    for batch in global_batches(5000, 500):
        seeds = range(FRESH + batch.start, FRESH + batch.stop)
        statistics.update(DETECTOR(sample(net, seeds, None, steps))["features"])
    return fid(statistics, reference)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    real = DETECTOR(discs(20_000, torch.Generator().manual_seed(99)))["features"]
    reference = Reference.from_statistics(FeatureStatistics(DETECTOR.num_features).update(real))
    write_reference(out / "real.npz", reference)
    lines = []
    for seed in range(3):
        net = kept(out / f"base-{seed}.safetensors", seed, STEPS)
        for steps in (10, 50):
            result = improve(
                net, sample=partial(sample, steps=steps), loss=loss, real=out / "real.npz", detector=DETECTOR,
                out=out / f"run-{seed}-{steps}", sample_batch_size=500,
            )  # fmt: skip
            points = {(p["snapshot"][:6], p["w"]): p["fid"] for p in result.details["points"]["evaluate"]}
            best = result.details["best"]["w"]
            longer = distance(kept(out / f"twice-{seed}.safetensors", seed, TWICE), reference, steps)
            cells = [result.base, points["snapsh", -1.0], result.neon, points["random", best], longer]
            error = 1.96 * result.standard_error
            lines.append(
                f"| {seed} | {steps} | {' | '.join(f'{cell:.4f}' for cell in cells)} | {best:.2f} | "
                f"{result.base - result.neon:.4f} ± {error:.4f} | {'Neon' if result.improved else 'base'} |"
            )
    print("\n".join(["| training seed | solver steps | base | self-trained | Neon | random direction | twice as long |"
                     " w | base - Neon | kept |", *lines]))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
