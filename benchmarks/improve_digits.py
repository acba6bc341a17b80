"""The digits of docs/improve.md: `neon improve` on a diffusers DDPM of 8 x 8 digits, three training seeds.

python benchmarks/improve_digits.py OUT    about ten minutes on one core; the same command continues

Base: a UNet2DModel of 164 thousand weights, trained on 1,197 digits with an average of the weights and a learning rate
that falls to 0. Distances are Frechet's in the 32 features of a small classifier of the training digits. `improve` sees
the training digits' statistics; the 600 held-out ones are measured afterwards, with the same fresh seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "edm")]

import diffusers
import matplotlib
import torch
from torch import Tensor

from neon_core.seeds import global_batches
from neon_edm.quickstart.digits import load_digits_split
from neon_edm.quickstart.features import DigitsDetector, FeatureNetwork, train_features
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_metrics import FeatureStatistics, Reference, fid, write_reference
from neon_run.pipelines.command import Chosen, improve_pipeline
from neon_run.pipelines.kinds import KINDS, Opened
from neon_run.pipelines.losses import Noising, pipeline_loss
from neon_run.pipelines.sampling import Sampling, pipeline_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, STEPS = 64, 3_000  # of the base's training
SOLVER_STEPS, SAMPLES = 20, 2_000
FRESH = 1_000_000 + SAMPLES  # where the seeds begin on which `improve` reports
PICTURED = 48
DDIM = next(kind for kind in KINDS if "DDIMPipeline" in kind.pipelines)
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8,
}  # fmt: skip


def pipeline_of(state: dict[str, Tensor] | None = None, seed: int = 0) -> diffusers.DDIMPipeline:
    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(**UNET)
    if state is not None:
        net.load_state_dict(state)
    pipeline = diffusers.DDIMPipeline(net.eval(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(digits: Tensor, seed: int, out: Path) -> None:
    """Writes out/half.safetensors and out/whole.safetensors: the average after half of the steps, and after all."""
    pipeline, generator = pipeline_of(seed=seed), torch.Generator().manual_seed(seed)
    net, opened, noising = pipeline.unet.train(), Opened(DDIM, pipeline, out), Noising.of(pipeline.scheduler)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for step in range(1, STEPS + 1):
        batch = digits[torch.randint(len(digits), [BATCH], generator=generator)]
        value = pipeline_loss(net, batch, None, generator, opened=opened, noising=noising)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        decay.step()
        average.update_parameters(net)
        if step in (STEPS // 2, STEPS):
            name = "whole" if step == STEPS else "half"
            write_checkpoint(out / f"{name}.safetensors", average.module.state_dict())


def images_of(checkpoint: Path, seeds: range) -> Tensor:
    pipeline = pipeline_of(read_checkpoint(checkpoint).state)
    given = {"opened": Opened(DDIM, pipeline, checkpoint), "sampling": Sampling(pipeline.scheduler, SOLVER_STEPS)}
    batches = [seeds[batch.start : batch.stop] for batch in global_batches(len(seeds), 500)]
    return torch.cat([pipeline_images(pipeline.unet, list(batch), None, **given) for batch in batches])


def statistics(detector: DigitsDetector, images: Tensor) -> FeatureStatistics:
    return FeatureStatistics(detector.num_features).update(detector(images)["features"])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits_split(0)
    network: FeatureNetwork = train_features(digits.train_images, digits.train_labels, seed=0)
    detector = DigitsDetector(network, "classifier of digits")
    training, heldout = (
        Reference.from_statistics(statistics(detector, images))
        for images in (digits.train_images, digits.heldout_images)
    )
    write_reference(out / "training.npz", training)
    lines, curves, fresh = [], [], range(FRESH, FRESH + SAMPLES)
    for seed in range(3):
        folder = out / f"seed-{seed}"
        if not (folder / "whole.safetensors").exists():
            train(digits.train_images, seed, folder)
        pipeline_of(read_checkpoint(folder / "whole.safetensors").state).save_pretrained(folder / "base")
        result = improve_pipeline(
            str(folder / "base"), folder / "improve", "cpu", Chosen(steps=SOLVER_STEPS), real=out / "training.npz",
            detector=detector, ranking_images=1_000, images=SAMPLES, sample_batch_size=500,
        )  # fmt: skip
        details, best = result.details, result.details["best"]["w"]
        measured = [p for p in details["points"]["evaluate"] if p["block"] == "second"]
        points = [(p["snapshot"][:6], p["w"], p["fid"]) for p in measured]
        (syn,) = (folder / "improve" / "finetune").glob("snapshot-*.safetensors")
        files = {"half": folder / "half.safetensors", "base": folder / "improve" / "base.safetensors",
                 "syn": syn, "neon": folder / "improve" / "neon.safetensors"}  # fmt: skip
        own = {name: statistics(detector, images_of(path, fresh)) for name, path in files.items()}
        far = {name: fid(value, heldout) for name, value in own.items()}
        random = next((f for kind, w, f in points if kind == "random"), float("nan"))
        cells = [fid(own["half"], training), result.base, fid(own["syn"], training), result.neon, random]
        lines.append(
            f"| {seed} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {best:.2f} | "
            f"{result.base - result.neon:.3f} ± {1.96 * result.standard_error:.3f} | "
            f"{' | '.join(f'{far[name]:.3f}' for name in files)} |"
        )
        curve = {w: f for kind, w, f in points if kind in ("snapsh", "base")}
        curves.append((sorted(curve.items()), (best, random)))
        if not seed:
            pictures = {name: images_of(files[name], fresh[:PICTURED]) for name in ("base", "syn", "neon")}
    names = "half as long | base | self-trained | Neon"
    print("\n".join([f"| training seed | {names} | random direction | w | base - Neon | held out: {names} |", *lines]))
    draw(out / "improve_digits.png", curves, {**pictures, "real": digits.heldout_images[:PICTURED]})


def draw(path: Path, curves: list, pictures: dict[str, Tensor]) -> None:
    """Distance over w of each seed, and sampled digits of the first."""
    names = {"base": "base", "syn": "self-trained (w = -1)", "neon": "Neon", "real": "real"}
    figure, axes = plt.subplots(1, 5, figsize=(13, 3.4), width_ratios=[1.9, 1, 1, 1, 1], layout="constrained")
    for seed, (curve, (w, random)) in enumerate(curves):
        axes[0].plot(*zip(*curve, strict=True), "o-", color=f"C{seed}", label=f"training seed {seed}")
        axes[0].plot(w, random, "x", color=f"C{seed}", label="random direction" if seed == 2 else None)
    axes[0].set(xlabel="w (0: the base)", ylabel="distance to the training digits", yscale="log")
    axes[0].legend(fontsize=8)
    for axis, (name, images) in zip(axes[1:], pictures.items(), strict=True):
        framed = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=90)
        grid = framed.reshape(8, 6, 10, 10).permute(0, 2, 1, 3).reshape(80, 60)
        axis.imshow(grid, cmap="gray", vmin=0, vmax=255)
        axis.set_title(names[name], fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
