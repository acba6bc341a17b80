"""One seed from real digits to Neon, by the same functions as the rows of the paper's table.

    features -> base -> synthetic set -> self-trained -> w chosen on training digits -> report on held-out digits

What an earlier run left under the seed's folder is kept: base, set and fine-tunes by their own files, the finished seed
by `result.json`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon_core.backbone import TrainSettings
from neon_core.evaluate import evaluate
from neon_core.files.atomic import atomic_path
from neon_core.files.checkpoint import read_checkpoint
from neon_core.files.image_set import ImageSet
from neon_core.merge import NeonWeights, merge_files, neon_merge
from neon_core.metrics.accumulator import MetricAccumulator
from neon_core.metrics.scores import frechet_distance
from neon_core.metrics.statistics import FeatureStatistics
from neon_core.prepared import TrainingData, training_data
from neon_core.seeds import derive_seed
from neon_core.selftrain import self_train
from neon_core.synthetic import generate_set
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.controls import random_direction
from neon_edm.quickstart.digits import load_digits_split
from neon_edm.quickstart.features import NUM_FEATURES, accuracy, features_and_pixels, train_features
from neon_edm.quickstart.recipes import BATCH, Quickstart

CPU = torch.device("cpu")
SAMPLE_BATCH = 500
GRID_IMAGES = 100
SEEDS_PER_RUN = 1_000_000  # of image seeds: two runs never share noise
SYNTHETIC_FROM, SELECTION_FROM, REPORT_FROM = 0, 200_000, 400_000  # nor do a run's three uses of them

Progress = Callable[[str, int], None]  # (stage, network passes done since the last call)


def run_seed(quickstart: Quickstart, seed: int, out_dir: Path, progress: Progress) -> dict:
    """The record of one seed, JSON, also written to `out_dir`/result.json; samples for the pictures to samples.npz.

    Raises UserError where the folder holds stages of a run with other settings.
    """
    result = {"identity": identity(quickstart, seed), **SeedRun(quickstart, seed, out_dir, progress).all_stages()}
    with atomic_path(out_dir / "result.json") as temporary:  # last: who finds it finds everything
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def find_result(quickstart: Quickstart, seed: int, out_dir: Path) -> dict | None:
    """The record that an earlier run of the same settings left in `out_dir`."""
    path = out_dir / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["identity"] == identity(quickstart, seed) else None


def identity(quickstart: Quickstart, seed: int) -> dict:
    return json.loads(json.dumps({"seed": seed, "settings": dataclasses.asdict(quickstart)}, default=str))


def passes_per_seed(quickstart: Quickstart) -> int:
    """About how many network passes a seed takes: a training image counts 3, a sample 35."""
    trained = quickstart.base.images + 2 * quickstart.recipe.train.images + quickstart.feature_steps * BATCH
    sampled = quickstart.recipe.num_synthetic + quickstart.num_evaluate * (len(quickstart.w_grid) + 6) + 3 * GRID_IMAGES
    return 3 * trained + 35 * sampled


class SeedRun:
    """The stages of one seed, in the order of `all_stages`."""

    def __init__(self, quickstart: Quickstart, seed: int, out_dir: Path, progress: Progress):
        self.quickstart, self.recipe, self.seed, self.out_dir = quickstart, quickstart.recipe, seed, out_dir
        self.progress = progress
        self.stage = ""
        self.digits = load_digits_split(seed)

    def all_stages(self) -> dict:
        """The record of the run."""
        began, seconds = time.monotonic(), {}

        def timed(stage: str, function: Callable, *args):
            self.stage = stage
            self.tick(0)
            start = time.monotonic()
            value = function(*args)
            seconds[stage] = round(time.monotonic() - start, 2)
            return value

        real = timed("features", self.measure_real)
        base = timed("base", self.train_base)
        timed("synthetic set", self.generate, base)
        syn = timed("fine-tune", self.fine_tune, base)
        on_real = timed("control", self.fine_tune_on_real, base)

        theta_base, theta_syn = read_checkpoint(base).state, read_checkpoint(syn).state
        backbone = self.load(base)
        line = NeonWeights(backbone.net, theta_base, theta_syn)
        selection = timed("choose w", self.selection, backbone, line)
        w_star = min((point for point in selection if point["w"] >= 0), key=lambda point: point["train"])["w"]
        merge_files(base, syn, w_star, self.out_dir / "neon.safetensors")

        theta_random = random_direction(theta_base, theta_syn, self.random_seed("random direction"))
        randomly = NeonWeights(backbone.net, theta_base, theta_random)
        really = NeonWeights(backbone.net, theta_base, read_checkpoint(on_real).state)
        places = {
            "base": (line, 0.0),
            "self_trained": (line, -1.0),
            "neon_fixed": (line, self.recipe.w),
            "neon": (line, w_star),
            "random_direction": (randomly, w_star),
            "real_data": (really, -1.0),
        }
        report = timed("report", self.report, backbone, places)
        timed("samples", self.save_samples, backbone, places)
        seconds["all"] = round(time.monotonic() - began, 2)

        minus_one = neon_merge(theta_base, theta_syn, -1.0)
        return {
            "seed": self.seed,
            "heldout_accuracy": self.accuracy,
            "real": real,
            "step_length": line.distance(),
            "minus_one_error": max(float((minus_one[name] - theta_syn[name]).abs().max()) for name in theta_syn),
            "selection": selection,
            "w_star": w_star,
            "report": report,
            "seconds": seconds,
        }

    # The stages.

    def measure_real(self) -> dict[str, float]:
        """Train the feature network and take the statistics of the real digits; those of the training part against
        the held-out part."""
        digits = self.digits
        network = train_features(
            digits.train_images,
            digits.train_labels,
            seed=self.random_seed("features"),
            num_steps=self.quickstart.feature_steps,
            on_step=lambda: self.tick(3 * BATCH),
        )
        self.accuracy = accuracy(network, digits.heldout_images, digits.heldout_labels)
        self.detector = features_and_pixels(network)
        self.train, self.heldout = (
            FeatureStatistics(self.detector.num_features).update(self.detector(images)["features"])
            for images in (digits.train_images, digits.heldout_images)
        )
        return self.distances(self.train)

    def train_base(self) -> Path:
        """Real training digits -> theta_base."""
        backbone = self.watched(DigitsBackbone.create(self.random_seed("initial weights")))
        return self.trained(backbone, self.real_data(), self.quickstart.base, "base")

    def generate(self, base: Path) -> None:
        """theta_base -> the synthetic set, images and labels on disk."""
        generate_set(
            self.load(base),
            self.image_seeds(SYNTHETIC_FROM, self.recipe.num_synthetic),
            self.out_dir / "synthetic",
            settings=self.recipe.generate,
            batch_size=SAMPLE_BATCH,
            provenance={"recipe": self.recipe.name, "run_seed": self.seed},
        )

    def fine_tune(self, base: Path) -> Path:
        """theta_base, S -> theta_syn."""
        backbone = self.load(base)
        data = training_data(backbone, ImageSet(self.out_dir / "synthetic"), CPU)
        return self.trained(backbone, data, self.recipe.train, "self_trained")

    def fine_tune_on_real(self, base: Path) -> Path:
        """The control: the same steps on real training digits."""
        return self.trained(self.load(base), self.real_data(), self.recipe.train, "real_data")

    def selection(self, backbone: DigitsBackbone, line: NeonWeights) -> list[dict]:
        """The grid of w, the same noise for all: a smooth curve. w* is chosen by the distance to training digits."""
        return [{"w": w, **self.measured(backbone, line, w, SELECTION_FROM)} for w in self.quickstart.w_grid]

    def report(self, backbone: DigitsBackbone, places: dict[str, tuple[NeonWeights, float]]) -> dict[str, dict]:
        """Fresh noise, the same for all."""
        return {name: self.measured(backbone, line, w, REPORT_FROM) for name, (line, w) in places.items()}

    def save_samples(self, backbone: DigitsBackbone, places: dict[str, tuple[NeonWeights, float]]) -> None:
        """The report's first samples and held-out digits, for the grid of the pictures: label i is i mod 10."""
        seeds = self.image_seeds(REPORT_FROM, GRID_IMAGES)
        labels = backbone.assign_labels(seeds)
        samples = {"real": in_label_order(self.digits.heldout_images, self.digits.heldout_labels, labels)}
        for name in ("self_trained", "base", "neon"):
            line, w = places[name]
            line.set(w)
            samples[name] = backbone.sample(seeds, labels, **self.recipe.evaluate)
        with atomic_path(self.out_dir / "samples.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{name: images.numpy() for name, images in samples.items()})

    # What they share.

    def tick(self, passes: int) -> None:
        self.progress(self.stage, passes)

    def random_seed(self, purpose: str) -> int:
        """Independent streams for initial weights, training noise, ..."""
        return derive_seed("quickstart", purpose, self.seed)

    def image_seeds(self, start: int, count: int) -> range:
        first = self.seed * SEEDS_PER_RUN + start
        return range(first, first + count)

    def watched(self, backbone: DigitsBackbone) -> DigitsBackbone:
        backbone.on_passes = self.tick
        return backbone

    def load(self, checkpoint: Path) -> DigitsBackbone:
        return self.watched(DigitsBackbone.load(checkpoint, self.recipe, CPU))

    def real_data(self) -> TrainingData:
        images, labels = self.digits.train_images, self.digits.train_labels
        return TrainingData(lambda indices: images[torch.from_numpy(indices)], labels, len(labels))

    def trained(self, backbone: DigitsBackbone, data: TrainingData, settings: TrainSettings, name: str) -> Path:
        """The last snapshot of the shared training loop."""
        snapshots = self_train(
            backbone, data, settings, self.out_dir / name, seed=self.random_seed(f"train {name}"), device=CPU
        )
        return snapshots[max(snapshots)]

    def measured(self, backbone: DigitsBackbone, line: NeonWeights, w: float, start: int) -> dict[str, float]:
        """The distances of `num_evaluate` samples at theta_base - w (the line's other end - theta_base)."""
        line.set(w)
        seeds = self.image_seeds(start, self.quickstart.num_evaluate)
        found = evaluate(
            backbone,
            seeds,
            lambda: MetricAccumulator(self.detector, len(seeds), ("fid",)),
            settings=self.recipe.evaluate,
            batch_size=SAMPLE_BATCH,
        )
        return self.distances(found.feature_statistics)

    def distances(self, found: FeatureStatistics) -> dict[str, float]:
        """Fréchet distances in features to training and held-out digits, in pixels to held-out ones, and the trace of
        the pixels' covariance."""
        features, pixels = slice(0, NUM_FEATURES), slice(NUM_FEATURES, None)
        return {
            "train": frechet(found, self.train, features),
            "heldout": frechet(found, self.heldout, features),
            "pixels": frechet(found, self.heldout, pixels),
            "variance": float(found.covariance()[pixels, pixels].trace()),
        }


def frechet(a: FeatureStatistics, b: FeatureStatistics, block: slice) -> float:
    """Fréchet distance between the Gaussians of some of the features."""
    return frechet_distance(a.mean[block], a.covariance()[block, block], b.mean[block], b.covariance()[block, block])


def in_label_order(images: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted label the next image that has it."""
    waiting = {int(k): iter(torch.nonzero(labels == k).flatten().tolist()) for k in wanted.unique()}
    return images[torch.tensor([next(waiting[int(k)]) for k in wanted])]
