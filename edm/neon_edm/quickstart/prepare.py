"""Makes the files that other rows fetch: the detector, the statistics of the real digits, and theta_base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from neon_core.backbone import TrainSettings
from neon_core.distributed import barrier, is_main
from neon_core.finetune import train_on
from neon_core.seeds import derive_seed
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.digits import load_digits_split
from neon_edm.quickstart.features import accuracy, read_detector, train_features
from neon_files.checkpoint import write_checkpoint
from neon_files.image_set import ImageSet
from neon_files.image_zip import write_image_zip
from neon_metrics.reference import Reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run.row import Row

CPU = torch.device("cpu")  # this network is too small for a GPU to gain anything
BATCH = 128


@dataclass(frozen=True)
class PrepareDigits:
    """`neon_run.row.Prepare` for the digits."""

    base: TrainSettings
    feature_steps: int

    @property
    def training_images(self) -> int:
        return self.base.images

    def __call__(self, row: Row, folder: Path, seed: int) -> dict[str, Path]:
        """`seed` deals the split and draws initial weights and training noise, each from a stream of its own."""
        files = {
            "detector": folder / "features.safetensors",
            "reference": folder / "train.npz",
            "heldout": folder / "heldout.npz",
            "real_training": folder / "real.zip",
        }
        digits, kind = load_digits_split(seed), cast(type[DigitsBackbone], row.backbone)
        if is_main() and not all(path.exists() for path in files.values()):
            network = train_features(
                digits.train_images,
                digits.train_labels,
                seed=derive_seed("quickstart", "features", seed),
                num_steps=self.feature_steps,
                on_step=lambda: kind.on_passes(3 * BATCH),
            )
            metadata = {"heldout_accuracy": accuracy(network, digits.heldout_images, digits.heldout_labels)}
            write_checkpoint(files["detector"], network.state_dict(), metadata=metadata)
            detector = read_detector(files["detector"], CPU)
            for name, images in (("reference", digits.train_images), ("heldout", digits.heldout_images)):
                statistics = FeatureStatistics(detector.num_features).update(detector(images)["features"])
                write_reference(files[name], Reference.from_statistics(statistics))
            write_image_zip(files["real_training"], digits.train_images, digits.train_labels)
        barrier()
        backbone = kind.create(derive_seed("quickstart", "initial weights", seed))
        snapshots = train_on(
            ImageSet(files["real_training"]),
            backbone,
            self.base,
            folder / "base",
            device=CPU,
            provenance={},
            name="base training",
            seed=derive_seed("quickstart", "train base", seed),
        )
        return {"base": snapshots[max(snapshots)], **files}
