"""`neon diagnose`: what two gradients at theta_base say before anything is fine-tuned or searched.

g(X) is the mean gradient of the row's own `self_training_loss` over images X. The fine-tune on S moves against g(S), so
Neon moves along it, and to first order the loss on real images changes by w lr <g(real), g(S)>: a negative cosine means
that Neon lowers that loss. It says nothing of the distance of samples, which only sampling sees (docs/diagnose.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import all_reduce_, rank, world_size
from neon_core.finetune import need_labels, open_set
from neon_core.precision import float32_precision
from neon_core.seeds import deal, derive_seed
from neon_core.selftrain import deterministic_dropout
from neon_files.checkpoint import read_state
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar
from neon_run.stages import Model

RELIABLE = 0.5  # below this a gradient is noise for the most part
PREDICTS = "the loss on real images along w, not the distance of samples"
Batch = tuple[Tensor, Tensor | None]  # uint8 [B, C, H, W], labels [B] or None
Images = Callable[[np.ndarray], Batch]  # of numbered images


@dataclass(frozen=True)
class Amount:
    """How much is looked at."""

    num_images: int = 2048  # of each kind of images, at most
    micro_batch_size: int | None = None  # None: the row's
    draws: int = 1  # of the loss's randomness, for each image
    seed: int = 0  # chooses the images and all randomness of the loss
    neutral: bool = True  # also images of the neutral sampler, which are drawn for this


class Gradient:
    """The mean gradient of two halves of the images, each a list of float32 tensors on the CPU, and the mean loss."""

    def __init__(self, halves: tuple[list[Tensor], list[Tensor]], loss: float = math.nan):
        self.halves, self.loss = halves, loss

    def __sub__(self, other: Gradient) -> Gradient:
        first, second = (
            [a - b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.halves, other.halves, strict=True)
        )
        return Gradient((first, second))

    def dot(self, other: Gradient) -> float:
        """Inner product of the two mean gradients."""
        return sum(_dot(mine, theirs) for mine in self.halves for theirs in other.halves) / 4

    @property
    def norm(self) -> float:
        return math.sqrt(self.dot(self))

    @property
    def norm_without_noise(self) -> float:
        """Root of the inner product of the halves, whose noise is independent: unbiased for the square; 0 below 0."""
        return math.sqrt(max(_dot(*self.halves), 0.0))

    @property
    def reliability(self) -> float:
        """The part of the squared norm that is no noise: 2 r / (1 + r) with the cosine r of the halves (Spearman 1910,
        Brown 1910); 0 where r is negative."""
        first, second = (_dot(half, half) for half in self.halves)
        r = max(_dot(*self.halves) / math.sqrt(first * second), 0.0) if first * second else 0.0
        return 2 * r / (1 + r)

    def described(self) -> dict[str, float]:
        numbers = {"norm": self.norm, "norm_without_noise": self.norm_without_noise, "reliability": self.reliability}
        return numbers if math.isnan(self.loss) else {"loss": self.loss, **numbers}


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float(x.double().flatten() @ y.double().flatten()) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Probe:
    """Gradients of a network at theta_base, over as many images of each kind. Every rank makes the same calls."""

    backbone: Backbone
    device: torch.device
    micro_batch_size: int
    count: int  # micro batches, even
    draws: int
    seed: int

    def images_of(self, images: ImageSet) -> Images:
        """Of a set, in random order."""
        labels = images.class_indices if self.backbone.num_classes else None
        order = self._order(len(images))

        def batch(numbers: np.ndarray) -> Batch:
            picked = order[numbers]
            return images.images(picked), None if labels is None else labels[torch.from_numpy(picked)]

        return batch

    def images_drawn(self, first_seed: int, count: int, settings: Mapping[str, Any]) -> Images:
        """Drawn when they are asked for, with `settings` of the sampler, of random ones of `count` seeds."""
        labels = self.backbone.assign_labels(range(first_seed, first_seed + count), **settings)
        order = self._order(count)

        def batch(numbers: np.ndarray) -> Batch:
            picked = order[numbers]
            given = None if labels is None else labels[torch.from_numpy(picked)]
            self.backbone.net.eval()
            images = self.backbone.sample([first_seed + int(i) for i in picked], given, **settings)
            return images.cpu(), given

        return batch

    def _order(self, count: int) -> np.ndarray:
        return np.random.default_rng(derive_seed("diagnose, order", self.seed)).permutation(count)

    def gradient(self, images: Images, stream: str, what: str = "") -> Gradient:
        """Of the loss in train mode, in float32. Halves are every second micro batch; `stream` names the randomness of
        the loss: gradients whose noise must be independent need different ones."""
        net, parameters = self.backbone.net, list(self.backbone.net.parameters())
        halves = tuple([torch.zeros_like(p, dtype=torch.float32) for p in parameters] for _ in range(2))
        total = torch.zeros([], device=self.device)
        numbers = deal(self.count, rank(), world_size())
        for number in progress_bar(numbers, desc=f"gradient on {what or stream}", unit="batch", disable=rank() > 0):
            start = number * self.micro_batch_size
            pixels, labels = images(np.arange(start, start + self.micro_batch_size))
            labels = None if labels is None else labels.to(self.device)
            net.train()
            with torch.no_grad():
                prepared = self.backbone.prepare(pixels.to(self.device) if self.backbone.prepared_key else pixels)
            for draw in range(self.draws):
                chosen = derive_seed("diagnose", stream, self.seed, number, draw)
                generator = torch.Generator(self.device).manual_seed(chosen)
                with torch.no_grad():
                    x = self.backbone.encode(prepared.to(self.device), generator)
                with deterministic_dropout(generator):
                    loss = self.backbone.self_training_loss(x, labels, generator)
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                total += loss.detach()
                for kept, new in zip(halves[number % 2], gradients, strict=True):
                    if new is not None:
                        kept += new
        for part in (*halves[0], *halves[1], total):
            all_reduce_(part)
        terms = self.count * self.draws
        first, second = ([part.cpu().div_(terms / 2) for part in half] for half in halves)
        found = Gradient((first, second), float(total) / terms)
        if not math.isfinite(found.loss + found.dot(found)):
            raise UserError(f"{what or stream}: the loss or its gradient is not finite at theta_base; check the images")
        return found


def diagnose(
    model: Model,
    data: Path,
    real: Path,
    amount: Amount | None = None,
    *,
    neutral: Mapping[str, Any] | None = None,
    snapshot: Path | None = None,
) -> dict[str, Any]:
    """The record of `neon diagnose`: both gradients, their cosine, the noise floor, the drift, and warnings.

    `data` is S, `real` real images of the same kind; `neutral` are settings that draw from the network's own
    distribution (`BackboneCommands.unbiased`); `snapshot` is theta_syn, where there is one already: then the record has
    the slope of the real loss along w, too. Every rank calls it. Raises UserError, before any gradient, where a set
    does not fit the network or is too small.
    """
    amount = amount or Amount()
    sets = {"real": open_set(real), "synthetic": open_set(data)}
    backbone = model.load(training=True)
    for images in sets.values():
        backbone.check_set(images)
        if backbone.num_classes:
            need_labels(images, model.checkpoint.name)
    probe = _probe(model, backbone, sets, amount)
    backbone.net.requires_grad_(True)
    with float32_precision(model.row.train_tf32):
        found = {name: probe.gradient(probe.images_of(images), name) for name, images in sets.items()}
        record = _compared(found["real"], found["synthetic"])
        if snapshot is not None:
            record["step"] = _along_step(backbone, found["real"], snapshot)
        for name, images in sets.items():
            record[name] |= {"path": str(images.path), "digest": images.digest}
        drift = _drift(probe, sets["synthetic"], found["synthetic"])
        settings = {**model.row.generate, **(neutral or {})}
        if amount.neutral and neutral and settings != dict(model.row.generate):
            backbone.check_network(**settings)
            drawn = probe.images_drawn(model.row.synthetic_seed, probe.micro_batch_size * probe.count, settings)
            record["neutral"] = {**probe.gradient(drawn, "neutral").described(), "settings": settings}
    record |= {"drift": drift} if drift else {}
    return {
        **model.provenance,
        **record,
        "warnings": warnings(record),
        "predicts": PREDICTS,
        "images": probe.micro_batch_size * probe.count,
        "micro_batch_size": probe.micro_batch_size,
        "draws": probe.draws,
        "seed": amount.seed,
    }


def _probe(model: Model, backbone: Backbone, sets: Mapping[str, ImageSet], amount: Amount) -> Probe:
    size = amount.micro_batch_size or model.row.train.micro_batch_size
    most = min(amount.num_images, *(len(images) for images in sets.values()))
    if amount.micro_batch_size is None and 2 * size > most:  # two halves of a small set
        multiple = backbone.micro_batch_multiple
        size = most // 2 // multiple * multiple
    if size < 1 or size % backbone.micro_batch_multiple or 2 * size > most:
        names = ", ".join(f"{images.path} has {len(images)}" for images in sets.values())
        raise UserError(
            f"--micro_batch_size {size or 1}: two halves need twice as many images, in multiples of "
            f"{backbone.micro_batch_multiple}; {names}, --num_images is {amount.num_images}"
        )
    return Probe(backbone, model.device, size, most // size // 2 * 2, amount.draws, amount.seed)


def _compared(real: Gradient, synthetic: Gradient) -> dict[str, Any]:
    """Both gradients and their cosine; divided by the root of both reliabilities, which noise only lowers it by
    (Spearman 1904), where both are large enough for that."""
    length = real.norm * synthetic.norm
    cosine = real.dot(synthetic) / length if length else 0.0
    reliable = min(real.reliability, synthetic.reliability) >= RELIABLE
    without_noise = cosine / math.sqrt(real.reliability * synthetic.reliability) if reliable else None
    return {
        "cosine": cosine,
        "cosine_without_noise": without_noise,
        "real": real.described(),
        "synthetic": synthetic.described(),
    }


def _along_step(backbone: Backbone, real: Gradient, snapshot: Path) -> dict[str, Any]:
    """The slope of the real loss along w at the base, and its cosine: of the step that was made, whose optimizer turns
    it away from the gradient on S."""
    theta_syn = read_state(snapshot, backbone.net.state_dict())
    away = [p.detach().cpu().float() - theta_syn[n].cpu().float() for n, p in backbone.net.named_parameters()]
    step = Gradient((away, away))
    slope, length = real.dot(step), real.norm * step.norm
    return {"snapshot": snapshot.stem, "slope": slope, "cosine": slope / length if length else 0.0}


def _drift(probe: Probe, images: ImageSet, synthetic: Gradient) -> dict[str, float] | None:
    """How far one more pass through the tokenizer moves the gradient on S, its randomness being the same; None where
    there is no tokenizer."""
    of_set, changes = probe.images_of(images), []

    def redrawn(numbers: np.ndarray) -> Batch:
        pixels, labels = of_set(numbers)
        again = probe.backbone.through_tokenizer(pixels.to(probe.device))
        assert again is not None  # of some images and not of others
        changes.append(float((again.cpu().float() - pixels.expand(*again.shape).float()).abs().mean()))
        return again.cpu(), labels

    if probe.backbone.through_tokenizer(of_set(np.arange(1))[0].to(probe.device)) is None:
        return None
    again = probe.gradient(redrawn, "synthetic", "S, redrawn")
    moved = again - synthetic
    signal = synthetic.norm_without_noise
    mean = all_reduce_(torch.tensor([sum(changes), len(changes)], dtype=torch.float32, device=probe.device))
    return {
        "grey_levels": float(mean[0] / mean[1]),
        **moved.described(),
        "of_signal": moved.norm_without_noise / signal if signal else math.inf,
    }


def warnings(record: Mapping[str, Any]) -> list[str]:
    """What makes the cosine worthless, one sentence each."""
    found = []
    for name, remedy in (("real", ", or with --real images that the base was not trained on"), ("synthetic", "")):
        if record[name]["reliability"] < RELIABLE:
            found.append(
                f"the gradient on {name} images is mostly noise (reliability {record[name]['reliability']:.2f}): the "
                f"sign of the cosine may be chance; try more --num_images, more --draws{remedy}"
            )
    signal = record["synthetic"]["norm_without_noise"]
    if "drift" in record and record["drift"]["norm_without_noise"] > signal:
        found.append(
            f"drift exceeds signal: one more pass through the tokenizer moves the gradient on S by "
            f"{record['drift']['norm_without_noise']:.3g}, the gradient itself is {signal:.3g}; S shows the tokenizer "
            "rather than the sampler"
        )
    if "neutral" in record and record["neutral"]["norm_without_noise"] > signal:
        found.append(
            f"the gradient on images of the neutral sampler is as large ({record['neutral']['norm_without_noise']:.3g} "
            f"against {signal:.3g}): S does not show what the sampler's settings do"
        )
    return found


def summary(record: Mapping[str, Any]) -> str:
    """One line."""
    real, synthetic = record["real"], record["synthetic"]
    cosine = f"cosine {record['cosine']:+.3f} (reliability: real {real['reliability']:.2f}, S "
    cosine += f"{synthetic['reliability']:.2f}"
    if record["cosine_without_noise"] is not None:
        cosine += f"; without noise {record['cosine_without_noise']:+.3f}"
    norms = f"norm: S {synthetic['norm_without_noise']:.3g}, real {real['norm_without_noise']:.3g}"
    if "neutral" in record:
        norms += f", neutral {record['neutral']['norm_without_noise']:.3g}"
    parts = [record["row"], cosine + ")", norms]
    if "drift" in record:
        parts.append(f"drift {record['drift']['of_signal']:.2f} of S")
    if "step" in record:
        parts.append(f"along the fine-tune's step {record['step']['cosine']:+.3f}")
    sign = record.get("step", record)["cosine"]
    way = f"w > 0 should {'lower' if sign < 0 else 'raise'} the loss on real images"
    return " | ".join([*parts, f"{'no sign' if record['warnings'] else way}; the distance is another matter"])
