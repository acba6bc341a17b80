#!/usr/bin/env python3
"""Speed of sampling on this machine's CPU, as ratios: bfloat16 to float32 of this checkout, or float32 of another one.

    python benchmarks/sampling.py                     every part: four networks and the two kinds of decoders
    python benchmarks/sampling.py edm kl              those named
    python benchmarks/sampling.py --against PATH      float32 of another checkout (its folder) to that of this one

Published widths with random weights; fewer blocks in the transformers, whose blocks are equal. The two sides run in
turn, on two threads, each in a process of its own, and the least CPU seconds of each are compared, so that a busy
machine slows both. The bars are those of bfloat16 on processors that compute it (AVX512-BF16, AMX).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(os.environ.get("SAMPLING_CHECKOUT", Path(__file__).resolve().parents[1]))  # of the code that is measured
sys.path[:0] = [str(ROOT / part) for part in (".", "VAR", "xAR", "edm", "imm")]

import click
import torch
from torch import nn

THREADS = 2
BARS = {"edm": 1.7, "imm": 1.7, "vqvae": 1.7, "kl": 1.7, "var": 1.5, "xar": 1.5}
BLOCKS = 2  # of a transformer


def filled(module: nn.Module) -> nn.Module:
    """Random weights of about the size of trained ones: a fresh network gives zeros, whatever it does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.02, generator=generator) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


def half(on: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def edm() -> Callable[[bool], None]:
    """CIFAR-10, 4 images, 2 steps: 3 calls of the U-Net."""
    from neon_edm.backbone import EDMBackbone
    from neon_edm.precond import build_network

    kwargs = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9,
              "model_channels": 128, "channel_mult": [2, 2, 2]}  # fmt: skip
    backbone = EDMBackbone(filled(build_network("EDMPrecond", kwargs)), {"class": "EDMPrecond", "kwargs": kwargs})
    labels = torch.arange(4)

    def run(bf16: bool) -> None:
        settings = {"precision": "bf16"} if bf16 else {}  # older checkouts know no precision
        backbone.sample([0, 1, 2, 3], labels, num_steps=2, **settings)

    return run


def imm() -> Callable[[bool], None]:
    """Blocks of DiT-XL/2, 2 images, 1 guided step."""
    from neon_imm.precond import IMMPrecond
    from neon_imm.sampler import pushforward, time_grid

    net = filled(IMMPrecond(img_resolution=32, img_channels=4, label_dim=1000, model_type="DiT", patch_size=2,
                            hidden_size=1152, num_heads=16, depth=BLOCKS, temb_type="stride"))  # fmt: skip
    latents, rows = torch.randn(2, 4, 32, 32) * 0.5, torch.eye(1000)[:2]
    grid = time_grid(net.schedule, "uniform", 1)

    def run(bf16: bool) -> None:
        with net.running(training=False, mixed_precision="bf16" if bf16 else None):
            pushforward(net, latents, grid, rows, 1.8)

    return run


def var() -> Callable[[bool], None]:
    """Blocks of VAR-d16 with its head, 2 images, 10 scales."""
    from neon_core.precision import product_layers, weights_as
    from neon_core.seeds import PerImageRandom
    from neon_var.architectures import ARCHITECTURES
    from neon_var.quantizer import MultiScaleQuantizer
    from neon_var.sampler import PerImageNoise, sample_scales
    from neon_var.var import VAR

    architecture = ARCHITECTURES["imagenet_256"]
    net = filled(VAR(**architecture.network() | {"depth": BLOCKS}))
    quantizer = filled(MultiScaleQuantizer(4096, 32, v_patch_nums=architecture.patch_nums))
    dtype = torch.bfloat16

    @torch.no_grad()
    def run(bf16: bool) -> None:
        noise = PerImageNoise(PerImageRandom(range(2)))
        layers = [*net.autocast_layers(), *product_layers(quantizer)]
        with half(bf16), weights_as(dtype if bf16 else None, layers):
            list(sample_scales(net, quantizer, torch.arange(2), noise, cfg=2.8, top_k=900, top_p=0.95))

    return run


def xar() -> Callable[[bool], None]:
    """Blocks of xAR-B's width, 2 images, 3 guided steps per cell."""
    from neon_core.seeds import PerImageRandom
    from neon_xar.sampler import sample_latents
    from neon_xar.xar import XAR

    sizes = {"embed_dim": 768, "depth": BLOCKS // 2, "num_heads": 12}
    net = filled(XAR(**{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in sizes.items()}))

    def run(bf16: bool) -> None:
        with half(bf16):
            sample_latents(net, torch.arange(2), 3, 3.8, PerImageRandom(range(2)).randn)

    return run


@torch.no_grad()
def decoder(vae: nn.Module, z: torch.Tensor) -> Callable[[bool], None]:
    """The product's way, `frozen_in`; checkouts without it decode in float32 alone."""

    @torch.no_grad()
    def run(bf16: bool) -> None:
        if not bf16:
            vae.decode(z)
            return
        from neon_core.precision import frozen_in

        with frozen_in(z.device, "bf16", vae):
            vae.decode(z)

    return run


def vqvae() -> Callable[[bool], None]:
    """VAR's decoder, 1 image of 256 pixels."""
    from neon_var.vqvae import VQVAE

    return decoder(filled(VQVAE()), torch.randn(1, 32, 16, 16))


def kl() -> Callable[[bool], None]:
    """KL-16's decoder, xAR's, 1 image of 256 pixels. (The SD-VAE's is the same code with other widths.)"""
    from neon_core.kl_vae import AutoencoderKL

    return decoder(filled(AutoencoderKL()), torch.randn(1, 16, 16, 16))


PARTS = {"edm": edm, "imm": imm, "vqvae": vqvae, "kl": kl, "var": var, "xar": xar}


def serve(name: str, bf16: bool) -> None:
    """CPU seconds of a run, one for each line on stdin."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    run = PARTS[name]()
    run(bf16)  # the first run allocates
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        run(bf16)
        print(time.process_time() - start, flush=True)


class Side:
    """A process that measures one part in one checkout and precision."""

    def __init__(self, name: str, checkout: Path, bf16: bool):
        words = [sys.executable, str(Path(__file__).resolve()), name, "--serve", "bf16" if bf16 else "fp32"]
        # Threads that wait do not spin, which would count as CPU seconds.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "SAMPLING_CHECKOUT": str(checkout)}
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        encoding="utf-8", env=environment)  # fmt: skip
        self.seconds: list[float] = []
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise click.ClickException(f"{checkout}: {name} cannot be measured there (see above)")

    def measure(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        self.seconds.append(float(self.process.stdout.readline()))

    def close(self) -> float:
        """The least seconds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        return min(self.seconds)


def cpu() -> tuple[str, set[str]]:
    """(name of the processor, its features), on Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    return values.get("model name", "unknown processor").strip(), set(values.get("flags", "").split())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another checkout.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of each side, in turn.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the ratios.")
@click.option("--serve", "serving", type=click.Choice(["fp32", "bf16"]), hidden=True)
def main(parts: tuple[str, ...], against: Path | None, repeats: int, json_path: Path | None, serving: str) -> None:
    """Ratios of CPU seconds in sampling; see the file."""
    if serving:
        serve(parts[0], serving == "bf16")
        return
    name, features = cpu()
    print(f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
          f"{THREADS} threads, {repeats} runs in turn, CPU seconds", flush=True)  # fmt: skip
    if against is None and not features & {"avx512_bf16", "amx_bf16"}:
        print("skipped: this processor does not compute bfloat16 (no AVX512-BF16, no AMX); its ratios say nothing")
        return
    ratios = {}
    for part in parts or PARTS:
        if against is None:
            sides = Side(part, ROOT, False), Side(part, ROOT, True)
            bar, words = BARS[part], ("fp32", "bf16")
        else:
            sides, bar, words = (Side(part, against, False), Side(part, ROOT, False)), 0.97, ("other", "this")
        for _ in range(repeats):
            for side in sides:
                side.measure()
        first, second = (side.close() for side in sides)
        ratios[part] = first / second
        verdict = "met" if ratios[part] >= bar else "MISSED"
        print(f"{part:<6} {words[0]} {first:6.2f} s   {words[1]} {second:6.2f} s   ratio {ratios[part]:.2f}   "
              f"bar {bar} {verdict}", flush=True)  # fmt: skip
    if json_path is not None:
        json_path.write_text(json.dumps({"cpu": name, "torch": torch.__version__, "ratios": ratios}, indent=1),
                             encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
