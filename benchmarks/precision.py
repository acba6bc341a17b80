#!/usr/bin/env python3
"""What bfloat16 does to an image and to a distance: the quickstart's base, sampled in float32 and bfloat16 with the
same seeds.

    python benchmarks/precision.py --out runs/precision            some three minutes on one core

The distance of each block of seeds is measured in both precisions, so that the differences are paired; their mean has
the standard error over blocks. The times are CPU seconds of sampling alone, the two in turn; also of the published EDM
networks at full size, with random weights. On a CPU bfloat16 gains only where it is built in (AVX512-BF16, AMX).
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "tests", "edm")]

import click
import numpy as np
import torch
from gpu_free.published import EDM_KWARGS

from neon_core.seeds import parse_seeds
from neon_edm.backbone import EDMBackbone
from neon_edm.precond import build_network
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.settings import DEFAULT
from neon_files.atomic import write_json
from neon_metrics.accumulator import extract_features
from neon_metrics.reference import load_reference
from neon_metrics.scores import fid_from_features
from neon_run.cli import run as run_command

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
FULL_SIZE = {"cifar10_cond": 8, "ffhq64": 2}  # images of a batch


def compare(out: Path, blocks: int) -> dict:
    """Distances and CPU seconds per block and precision, and how far the images lie apart."""
    row = DEFAULT.row()
    files = row.prepare(row, out, 0)
    backbone, detector = DigitsBackbone.load(files["base"], CPU), row.detector(files["detector"], CPU)
    reference = load_reference(files["reference"])
    seeds = parse_seeds(row.evaluate_seeds)
    parts = np.array_split(seeds, blocks)
    distance, seconds = np.zeros((2, blocks)), np.zeros((2, blocks))
    moved = np.zeros(blocks)
    for block, part in enumerate(parts):
        part, images = part.tolist(), []
        for i, precision in enumerate(PRECISIONS):  # in turn, so that a busy machine slows both
            start = time.process_time()
            chunks = [part[k : k + row.batch_size] for k in range(0, len(part), row.batch_size)]
            images.append([
                backbone.sample(chunk, backbone.assign_labels(chunk), precision=precision, **row.evaluate)
                for chunk in chunks
            ])  # fmt: skip
            seconds[i, block] = time.process_time() - start
            distance[i, block] = fid_from_features(extract_features(detector, images[-1]), reference)
        exact, half = (torch.cat(chunks).float() for chunks in images)
        moved[block] = (exact - half).abs().mean().item()
    difference = distance[1] - distance[0]
    return {
        "images_per_block": len(parts[0]),
        "blocks": blocks,
        "distance": dict(zip(PRECISIONS, distance.mean(axis=1).tolist(), strict=True)),
        "difference": difference.mean(),
        "standard_error": difference.std(ddof=1) / blocks**0.5,
        "mean_pixel_difference": moved.mean(),
        "cpu_seconds": dict(zip(PRECISIONS, seconds.sum(axis=1).tolist(), strict=True)),
    }


def speed(name: str, batch: int, repeats: int = 3) -> dict[str, float]:
    """Least CPU seconds of a batch of two steps, three network calls, of a published network with random weights."""
    net = build_network("EDMPrecond", EDM_KWARGS[name])
    backbone = EDMBackbone(net, {"class": "EDMPrecond", "kwargs": EDM_KWARGS[name]})
    seeds, least = list(range(batch)), dict.fromkeys(PRECISIONS, float("inf"))
    for _ in range(repeats):
        for precision in PRECISIONS:
            start = time.process_time()
            backbone.sample(seeds, backbone.assign_labels(seeds), num_steps=2, precision=precision)
            least[precision] = min(least[precision], time.process_time() - start)
    return least


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/precision"))
@click.option("--blocks", type=click.IntRange(2), default=4, show_default=True)
def main(out: Path, blocks: int) -> None:
    """bfloat16 against float32 on the quickstart's digits."""
    torch.set_num_threads(1)
    result = compare(out, blocks) | {"full_size": {name: speed(name, batch) for name, batch in FULL_SIZE.items()}}
    write_json(out / "precision.json", result)
    distance, seconds = result["distance"], result["cpu_seconds"]
    print(f"{blocks} blocks of {result['images_per_block']} images, equal seeds")
    print(f"distance  fp32 {distance['fp32']:.4f}  bf16 {distance['bf16']:.4f}  "
          f"difference {result['difference']:+.4f} +- {result['standard_error']:.4f}")  # fmt: skip
    print(f"pixels    mean absolute difference {result['mean_pixel_difference']:.3f} of 256 levels")
    for name, cpu in {"digits": seconds, **result["full_size"]}.items():
        print(
            f"{name:<14} fp32 {cpu['fp32']:6.2f} CPU s  bf16 {cpu['bf16']:6.2f}  ratio {cpu['fp32'] / cpu['bf16']:.2f}"
        )


if __name__ == "__main__":
    run_command(main)
