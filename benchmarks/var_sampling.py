"""Speed of VAR's sampler against a plain one (`tests/var/reference_path.py`), the tokens being the same.

    python benchmarks/var_sampling.py [--blocks 4] [--batch_size 8] [--repeats 3]

Width, heads, codes and scales of VAR-d16 at 256 px, with fewer blocks; random weights; the VQVAE decoder, which both
would share, is left out. Prints CPU seconds per batch (on one thread the clock of an idle machine) and their ratio.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "VAR"), str(ROOT / "tests" / "var")]

import torch
from reference_path import sample_tokens

from neon_core.seeds import PerImageRandom
from neon_var.architectures import ARCHITECTURES
from neon_var.quantizer import MultiScaleQuantizer
from neon_var.sampler import PerImageNoise, sample_scales
from neon_var.var import VAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    architecture = ARCHITECTURES["imagenet_256"]
    torch.manual_seed(0)
    kwargs = architecture.network() | {"depth": args.blocks}
    net = VAR(**kwargs).init_weights(torch.Generator().manual_seed(0), gamma=1.0).eval()
    net.head.weight.data.mul_(50)  # so that logits differ visibly between tokens
    quantizer = MultiScaleQuantizer(4096, 32, v_patch_nums=architecture.patch_nums)
    state = {name: value.detach() for name, value in net.state_dict().items()}
    vae_state = {f"quantize.{name}": value.detach() for name, value in quantizer.state_dict().items()}
    labels = torch.arange(args.batch_size)
    settings = {"cfg": 2.8, "top_k": 900, "top_p": 0.95}

    def noise() -> PerImageNoise:
        return PerImageNoise(PerImageRandom(range(args.batch_size)))

    @torch.no_grad()
    def product() -> torch.Tensor:
        return torch.cat([r.tokens for r in sample_scales(net, quantizer, labels, noise(), **settings)], dim=1)

    def plain() -> torch.Tensor:
        shape = (architecture.patch_nums, net.num_heads, args.blocks)
        return sample_tokens(state, vae_state, *shape, labels, noise().draw, **settings)[0]

    agree = (product() == plain()).float().mean().item()
    times = {product: [], plain: []}
    for _ in range(args.repeats):  # in turn, so that a busy machine slows both
        for path, seconds in times.items():
            start = time.process_time()
            path()
            seconds.append(time.process_time() - start)
    ours, theirs = min(times[product]), min(times[plain])
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.get_num_threads()} thread(s)")  # fmt: skip
    print(f"{args.blocks} blocks of width {net.width}, batch {args.batch_size}, {net.num_tokens} tokens per image")
    print(f"product {ours:.2f} CPU s   plain {theirs:.2f} CPU s   ratio {theirs / ours:.2f}   equal tokens {agree:.4f}")


if __name__ == "__main__":
    main()
