"""Seconds of the metrics at full size, each beside the usual way of computing it.

    python benchmarks/metrics.py [--images 10000] [--extractor_images 16] [--neighbours 2000] [--sqrtm]

CPU seconds of one process (wall time as well where several threads are allowed by OMP_NUM_THREADS), so that a busy
machine disturbs the ratios little. Features are random with a power-law spectrum, weights of the extractor are random:
the times do not depend on the values. Nothing is downloaded.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch

from neon_metrics import FeatureStatistics, InceptionDetector, Reference, fid, fid_from_features, kid, prdc
from neon_metrics.accumulator import MetricAccumulator, MetricSettings
from neon_metrics.inception import InceptionV3, folded, normalise, resize_tf1
from neon_run.check.numbers import fill

D = 2048


def timed(function: Callable, *args) -> tuple[float, float, object]:
    """(CPU seconds, wall seconds, result)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*args)
    return time.process_time() - cpu, time.perf_counter() - wall, result


def features(count: int, seed: int) -> torch.Tensor:
    """float32 [count, 2048], trace about 21 as in Inception's features, directions mixed at random."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, D + 1) ** -0.5
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(seed % 2)) / D**0.5
    return torch.randn(count, D, generator=generator) * (spread * (21 / spread.square().sum()).sqrt()) @ mix + 0.4


def line(text: str, cpu: float, wall: float, note: str = "") -> None:
    print(f"  {text:58s} {cpu:8.2f} s CPU {wall:8.2f} s wall  {note}", flush=True)


def frechet(count: int, with_sqrtm: bool) -> None:
    print(f"FID, {D} features")
    generated, real = features(count, 0), features(count, 1)

    def stream(x: torch.Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(D)
        for batch in x.split(256):
            statistics.update(batch)
        return statistics

    cpu, wall, statistics = timed(stream, generated)
    line(f"statistics of {count} images in batches of 256", cpu, wall)
    reference = Reference.from_statistics(stream(real))
    cpu, wall, _ = timed(lambda: reference.factor)
    line("factor of the reference, once per process", cpu, wall)
    cpu, wall, ours = timed(fid, statistics, reference)
    line("FID from statistics", cpu, wall, f"{ours:.9f}")
    cpu, wall, value = timed(fid_from_features, generated, reference)
    line(f"FID from {count} features (statistics included)", cpu, wall, f"{value:.9f}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu, wall, value = timed(fid_from_features, generated[:1024], reference)
        line("FID from 1024 features (singular covariance)", cpu, wall, f"{value:.9f}")
    sigmas = statistics.covariance().numpy(), reference.sigma
    rest = np.sum((statistics.mean.numpy() - reference.mu) ** 2) + np.trace(sigmas[0]) + np.trace(sigmas[1])

    def eigenvalues() -> float:
        return rest - 2 * np.sqrt(np.linalg.eigvals(sigmas[0] @ sigmas[1]).astype(complex)).real.sum()

    def square_root() -> float:
        from scipy.linalg import sqrtm

        return rest - 2 * np.trace(sqrtm(sigmas[0] @ sigmas[1])).real

    others = {"eigenvalues of S1 S2 (torch-fidelity)": eigenvalues}
    others |= {"scipy sqrtm of S1 S2 (EDM, ADM, pytorch-fid)": square_root} if with_sqrtm else {}
    for name, function in others.items():
        cpu, wall, value = timed(function)
        line(name, cpu, wall, f"{value:.9f}")


def extractor(count: int, size: int, repeats: int = 3) -> None:
    print(f"Inception features, {size} x {size} images in batches of 8")
    torch.manual_seed(0)
    net = InceptionV3().eval()
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    detector = InceptionDetector(net, "random weights", official=False, chunk_images=8)

    def plain(model: torch.nn.Module, layout: torch.memory_format) -> Callable:
        def run() -> torch.Tensor:
            with torch.no_grad():
                prepared = (normalise(resize_tf1(batch)).contiguous(memory_format=layout) for batch in images.split(8))
                return torch.cat([model(x)["2048"] for x in prepared])

        return run

    last = torch.channels_last
    variants = {
        "modules as published": plain(net, torch.contiguous_format),
        "channels last": plain(InceptionV3().eval().to(memory_format=last), last),
        "batch norm folded": plain(folded(net).to(memory_format=torch.contiguous_format), torch.contiguous_format),
        "product: folded, channels last": lambda: detector(images)["features"],
        "resize alone": lambda: [normalise(resize_tf1(batch)) for batch in images.split(8)],
    }
    best = dict.fromkeys(variants, float("inf"))
    walls = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):  # in turn, so that a busy machine slows all of them
        for name, run in variants.items():
            cpu, wall, _ = timed(run)
            best[name], walls[name] = min(best[name], cpu), min(walls[name], wall)
    first = best["modules as published"]
    for name, cpu in best.items():
        line(name, cpu, walls[name], f"{count / cpu:6.1f} images/s of CPU time, {first / cpu:.2f} x")
    expected = variants["modules as published"]()
    gap = (expected - detector(images)["features"]).abs().max() / expected.abs().max()
    print(f"  largest difference of a feature, product against published modules: {gap:.1e} of the largest feature")


class InMemory(torch.utils.data.Dataset):
    """uint8 [n, 3, H, W] as torch-fidelity takes it."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def against_torch_fidelity(count: int, size: int, repeats: int = 3) -> None:
    """Images in memory -> Inception Score, and mean and covariance for FID, by both, on the same weights, in turn."""
    try:
        from torch_fidelity import metric_fid, metric_isc
        from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
    except ImportError:
        print("torch-fidelity is not installed: skipped (pip install torch-fidelity --no-deps)")
        return
    print(f"Evaluation of {count} images of {size} x {size} in memory, batches of 8")
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    net = fill(InceptionV3()).eval()
    layers = ["2048", "logits_unbiased"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pth")
        torch.save(net.state_dict(), path)
        options = {"feature_extractor_weights_path": path, "cuda": False, "verbose": False}
        extractor = create_feature_extractor("inception-v3-compat", layers, **options)
    detector = InceptionDetector(net, "the same weights", official=False)

    def theirs() -> float:
        found = extract_featuresdict_from_input_id(
            1, extractor, input1=InMemory(images), batch_size=8, save_cpu_ram=True, cuda=False, verbose=False
        )
        metric_fid.fid_featuresdict_to_statistics(found, "2048")
        return metric_isc.isc_featuresdict_to_metric(
            found, "logits_unbiased", isc_splits=4, samples_shuffle=True, rng_seed=2020, verbose=False
        )["inception_score_mean"]

    def ours() -> float:
        accumulator = MetricAccumulator(detector, count, ("fid", "is"), MetricSettings(is_splits=4))
        for start in range(0, count, 8):
            accumulator.update(images[start : start + 8], range(start, min(start + 8, count)))
        accumulator.feature_statistics.covariance()
        return accumulator.inception_score.score()[0]

    ratios = []
    for _ in range(repeats):
        cpu_theirs, wall_theirs, score_theirs = timed(theirs)
        cpu, wall, score = timed(ours)
        line("torch-fidelity", cpu_theirs, wall_theirs, f"IS {score_theirs:.9f}")
        line("ours", cpu, wall, f"IS {score:.9f}, {cpu_theirs / cpu:.2f} x")
        ratios.append(cpu_theirs / cpu)
    print(f"  ratios of CPU time {', '.join(f'{ratio:.2f}' for ratio in ratios)}: median {np.median(ratios):.2f} x")


def neighbours(count: int) -> None:
    print(f"Neighbours and kernels, {count} against {count} points with {D} features")
    generated, real = features(count, 2), features(count, 3)
    cpu, wall, scores = timed(lambda: prdc(real=real, generated=generated, k=5))
    line("precision, recall, density, coverage", cpu, wall, f"precision {scores.precision:.4f}")
    direct = timed(lambda: torch.cdist(real.double(), generated.double(), compute_mode="donot_use_mm_for_euclid_dist"))
    line("one of the three distance matrices from differences", *direct[:2], f"{3 * direct[0] / cpu:.1f} x for three")
    size = min(1000, count)
    cpu, wall, _ = timed(lambda: kid(generated=generated, real=real, subsets=10, subset_size=size))
    line(f"KID, 10 of the 100 subsets of {size}", cpu, wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--extractor_images", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--neighbours", type=int, default=2000)
    parser.add_argument("--sqrtm", action="store_true", help="time scipy's matrix square root too (slow)")
    args = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), torch {torch.__version__}")
    frechet(args.images, args.sqrtm)
    extractor(args.extractor_images, args.image_size)
    against_torch_fidelity(args.extractor_images, args.image_size)
    neighbours(args.neighbours)


if __name__ == "__main__":
    main()
