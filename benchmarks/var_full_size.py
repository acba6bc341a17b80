"""Full-size VAR with random weights, from labels to uint8 images: seconds, images per second, peak memory.

python benchmarks/var_full_size.py                                                  (VAR-d16, 2 images, CPU)
python benchmarks/var_full_size.py --preset imagenet_512 --device cuda --batch_size 16 --precision bf16 --compile
"""

import argparse
import os
import platform
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "VAR")]

import torch

from neon_run.backbones import choose_row
from neon_run.compiling import compile_network
from neon_var.architectures import ARCHITECTURES, tokenizer
from neon_var.backbone import VARBackbone
from neon_var.rows import ROWS
from neon_var.var import VAR
from neon_var.vqvae import VQVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(ARCHITECTURES), default="imagenet_256")
    parser.add_argument("--model_depth", type=int)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1, help="Timed; on CUDA one more is made before.")
    parser.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    device, architecture = torch.device(args.device), ARCHITECTURES[args.preset]
    began, cpu_began = time.perf_counter(), time.process_time()
    torch.manual_seed(0)
    kwargs = architecture.network(args.model_depth)
    with torch.device("meta"):
        net, vae = VAR(**kwargs), VQVAE(**tokenizer(architecture.patch_nums))
    buffers = VAR(**kwargs | {"depth": 1, "embed_dim": 64, "num_heads": 1})  # for their values
    net, vae = net.to_empty(device=device), vae.to_empty(device=device)
    for name in ("lvl_1L", "attn_bias_for_masking"):
        getattr(net, name).copy_(getattr(buffers, name))
    for block in net.blocks:
        block.attn.zero_k_bias.zero_()
    net.init_weights(gamma=1.0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(0, fan_in**-0.5) if parameter.dim() > 1 else parameter.fill_(
                float(name.endswith("weight"))
            )
    if args.compile:
        compile_network(net, net.blocks, device, dynamic=True)
    backbone = VARBackbone(net.eval().requires_grad_(False), vae, kwargs)
    count = sum(p.numel() for p in net.parameters())
    built = f"built in {time.perf_counter() - began:.1f} s ({time.process_time() - cpu_began:.1f} CPU s)"
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    print(f"VAR-d{net.depth}, {count:,} parameters, {backbone.img_size} px, {args.precision}, compile {args.compile}")
    print(f"{machine}; {built}")

    def batch(number: int) -> torch.Tensor:
        seeds = range(number * args.batch_size, (number + 1) * args.batch_size)
        return backbone.sample(seeds, None, **choose_row(ROWS, args.preset).evaluate, precision=args.precision).cpu()

    if device.type == "cuda":
        batch(1000)
        torch.cuda.reset_peak_memory_stats()
    began, cpu_began = time.perf_counter(), time.process_time()
    for number in range(args.batches):
        images = batch(number)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    made = args.batches * args.batch_size
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{made} images {tuple(images.shape[1:])} {images.dtype} in {seconds:.1f} s ({cpu_seconds:.1f} CPU s), "
          f"{made / seconds:.3f} images/s, peak memory {peak:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
