"""Speed of xAR's sampler against a plain one (`tests/xar/reference_path.py`), the latents being the same.

    python benchmarks/xar_sampling.py [--blocks 2] [--batch_size 8] [--steps 4] [--repeats 3]
    python benchmarks/xar_sampling.py --full [--batch_size 2] [--steps 4]      the whole xar_base, with its autoencoder

Width and heads of xAR-B with fewer blocks; random weights; the autoencoder, which both would share, is left out. Times
are of the processor, which a busy machine changes less than the clock. On a GPU: --device cuda [--precision bf16].
"""

import argparse
import os
import platform
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "xAR"), str(ROOT / "tests" / "xar")]

import torch
from reference_path import sample_latents_plainly

from neon_core.kl_vae import AutoencoderKL
from neon_core.precision import PRECISIONS, autocast
from neon_core.seeds import PerImageRandom
from neon_xar.backbone import XARBackbone
from neon_xar.sampler import sample_latents
from neon_xar.xar import SIZES, XAR, build


def clock(device: torch.device) -> float:
    """Seconds: of the processor on the CPU, of the wall on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def narrow(name: str, blocks: int) -> XAR:
    size = SIZES[name]
    sizes = {"embed_dim": size["width"], "depth": blocks // 2, "num_heads": size["heads"]}
    return XAR(**{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in sizes.items()})


def ratio(args: argparse.Namespace, device: torch.device) -> None:
    """Plain over product time, with and without guidance."""
    net = narrow(args.model, args.blocks).to(device).eval()
    if args.compile:
        net.compile_blocks()
    labels = torch.arange(args.batch_size, device=device)
    print(
        f"{args.blocks} blocks of {args.model}, batch {args.batch_size}, {args.steps} steps per cell, {args.precision}"
    )
    for cfg in (1.0, 3.8):
        times, latents = {sample_latents: [], sample_latents_plainly: []}, {}
        with autocast(device, args.precision):
            for _ in range(args.repeats):  # in turn, so that a busy machine slows both
                for path, seconds in times.items():
                    random = PerImageRandom(range(args.batch_size), device)
                    start = clock(device)
                    latents[path] = path(net, labels, args.steps, cfg, random.randn)
                    seconds.append(clock(device) - start)
        ours, plain = min(times[sample_latents]), min(times[sample_latents_plainly])
        gap = (latents[sample_latents] - latents[sample_latents_plainly]).abs().max().item()
        print(
            f"cfg {cfg}: product {ours:.2f} s   plain {plain:.2f} s   ratio {plain / ours:.2f}   difference {gap:.1e}"
        )


def full(args: argparse.Namespace, device: torch.device) -> None:
    """Images of a whole network with random weights: seconds and peak memory."""
    start, began = clock(device), time.perf_counter()
    backbone = XARBackbone(build(args.model).to(device).eval(), AutoencoderKL().to(device))
    if args.compile:
        backbone.net.compile_blocks()
    print(f"{args.model} and KL-16 built: {clock(device) - start:.1f} s")
    settings = {"cfg": 3.8, "flow_steps": args.steps, "precision": args.precision}
    for repeat in range(args.repeats):
        start, began = clock(device), time.perf_counter()
        images = backbone.sample(range(args.batch_size), None, **settings)
        seconds, wall = clock(device) - start, time.perf_counter() - began
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"run {repeat}: {tuple(images.shape)} in {seconds:.1f} s ({wall:.1f} s on the clock), "
            f"{args.batch_size / wall:.2f} images/s, peak memory {peak:.2f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="xar_base")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="Whole networks, product only.")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (2 if args.full else 8)
    args.repeats = args.repeats or (1 if args.full else 3)
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {device}"
    )
    (full if args.full else ratio)(args, device)


if __name__ == "__main__":
    main()
