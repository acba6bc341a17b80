"""Speed of IMM's sampler against a plain one (`tests/imm/reference_path.py`), the samples being the same.

    python benchmarks/imm_sampling.py [--blocks 4] [--batch_size 4] [--num_steps 2] [--repeats 3]
    python benchmarks/imm_sampling.py --full_size      # DiT-XL/2 and the SD-VAE, one image: seconds and peak memory

Width, heads and tokens of DiT-XL/2 at 256 px, with fewer blocks; random weights; guidance 1.8; the autoencoder, which
both would share, is left out of the ratio. Prints seconds per batch. --precision is the product's; plain is float32.
"""

import argparse
import os
import platform
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "imm"), str(ROOT / "tests" / "imm")]

import torch
from reference_path import sample

from neon_core.kl_vae import AutoencoderKL
from neon_imm.backbone import IMMBackbone
from neon_imm.latents import VaeCodec
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond
from neon_imm.rows import IMAGENET_NETWORK
from neon_imm.sampler import pushforward, time_grid
from neon_imm.vae_files import SD_VAE_CONFIG

CFG = 1.8


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of the size of trained ones: a fresh DiT gives zeros, whatever it does. Made in place, from meta."""
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.02, generator=generator) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


def network(**changes) -> IMMPrecond:
    kwargs = {**IMAGENET_NETWORK, **changes}
    with torch.device("meta"):
        net = IMMPrecond(**kwargs)
    return random_weights(net)


def ratio(args: argparse.Namespace) -> None:
    width = {"model_type": "DiT", "patch_size": 2, "hidden_size": 1152, "num_heads": 16, "depth": args.blocks}
    net = network(**width)
    if args.compile:
        for block in net.model.blocks:
            block.compile()
    state = {name: value.detach() for name, value in net.model.state_dict().items()}
    latents = torch.randn(args.batch_size, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * net.sigma_data
    labels = torch.arange(args.batch_size)
    rows = torch.nn.functional.one_hot(labels, 1000).float()
    grid = time_grid(net.schedule, "uniform", args.num_steps)
    precision = None if args.precision == "fp32" else args.precision

    def product() -> torch.Tensor:
        with net.running(training=False, mixed_precision=precision):
            return pushforward(net, latents, grid, rows, CFG)

    def plain() -> torch.Tensor:
        return sample(state, latents, labels, args.num_steps, CFG, heads=16, patch=2)

    # Processor time where one thread does all: other programs do not disturb it.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    difference = (product() - plain()).abs().max().item()
    times = {product: [], plain: []}
    for _ in range(args.repeats):  # in turn, so that a busy machine slows both
        for path, seconds in times.items():
            start = clock()
            path()
            seconds.append(clock() - start)
    ours, theirs = min(times[product]), min(times[plain])
    print(f"{args.blocks} blocks of width 1152, batch {args.batch_size}, {args.num_steps} steps, 256 tokens per image")
    print(f"product {ours:.2f} s   plain {theirs:.2f} s   ratio {theirs / ours:.2f}   difference {difference:.2g}")


@torch.no_grad()
def full_size() -> None:
    began, clock = time.perf_counter(), time.process_time
    net = network()
    with torch.device("meta"):
        vae = AutoencoderKL.from_diffusers_config(SD_VAE_CONFIG)
    vae = random_weights(vae).to(memory_format=torch.channels_last)
    backbone = IMMBackbone(net, VaeCodec(vae), IMMLoss(), {})
    built, cpu = time.perf_counter(), clock()
    image = backbone.sample([0], torch.tensor([207]), num_steps=1, cfg=CFG)
    done, cpu = time.perf_counter(), clock() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in net.parameters())
    print(f"DiT-XL/2, {parameters:,} parameters, and the SD-VAE: built in {built - began:.1f} s")
    print(f"one image of {image.shape[-1]} pixels at T = 1 with guidance: {done - built:.1f} s, {cpu:.1f} s of them on "
          f"the processor; peak memory {peak:.2f} GiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--full_size", action="store_true")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch "
          f"{torch.__version__}, {torch.get_num_threads()} thread(s)")  # fmt: skip
    full_size() if args.full_size else ratio(args)


if __name__ == "__main__":
    main()
