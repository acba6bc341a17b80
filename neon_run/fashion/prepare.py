"""Makes the files that other rows fetch: the detector, statistics of the real images, and a base trained on them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neon_core.backbone import Backbone, TrainSettings
from neon_core.distributed import barrier, is_main
from neon_core.finetune import train_on
from neon_core.seeds import derive_seed
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.image_zip import write_image_zip
from neon_metrics.detector import Detector
from neon_metrics.reference import Reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run.fashion.data import Fashion, load_fashion
from neon_run.fashion.features import LEAST_ACCURACY, STEPS, accuracy, read_detector, train_features
from neon_run.row import Row

CPU = torch.device("cpu")  # these networks are too small for a GPU to gain anything


@dataclass(frozen=True)
class PrepareFashion(ABC):
    """`neon_run.row.Prepare` for Fashion-MNIST; a backbone adds its networks.

    `base` is the training of theta_base. It goes on to twice that length, for the opponent "trained twice as long": so
    its learning rate must not depend on the end.
    """

    base: TrainSettings
    data: str | None = None  # folder of the idx files; None: where `data.find_folder` finds them
    feature_steps: int = STEPS

    @property
    def training_images(self) -> int:
        return 2 * self.base.images

    @abstractmethod
    def create(self, folder: Path, fashion: Fashion, seed: int) -> tuple[Backbone, dict[str, Path]]:
        """The backbone on the CPU, with initial weights drawn from `seed`, and its frozen files: option of `load` ->
        file below `folder`, read where an earlier call left it. Every rank calls it; the main one writes."""
        ...

    def redraw(self, backbone: Backbone, images: Tensor) -> Tensor:
        """uint8 [B, 1, 16, 16] as this backbone can draw them at best, for the reference statistics: unchanged, unless
        it has a tokenizer that blurs."""
        return images

    def __call__(self, row: Row, folder: Path, seed: int) -> Mapping[str, Path]:
        """See `Prepare`; also "longer", the base trained twice as long. Raises UserError, before the base is trained,
        where data files are missing or the classifier is wrong too often."""
        fashion = load_fashion(self.data)
        detector = self.make_detector(folder / "features.safetensors", fashion)
        real = folder / "real.zip"
        if is_main() and not real.exists():
            write_image_zip(real, fashion.train_images, fashion.train_labels)
        barrier()
        backbone, frozen = self.create(folder, fashion, derive_seed("fashion", "create", seed))
        references = {"reference": fashion.train_images, "heldout": fashion.heldout_images}
        for name, images in references.items():
            self.make_reference(folder / f"{name}.npz", detector, backbone, images)
        longer = dataclasses.replace(self.base, images=2 * self.base.images, snapshot_images=self.base.images)
        snapshots = train_on(
            ImageSet(real),
            backbone,
            longer,
            folder / "base",
            device=CPU,
            provenance={},
            name="base training",
            seed=derive_seed("fashion", "train base", seed),
        )
        return {
            "base": snapshots[self.base.images],
            "longer": snapshots[longer.images],
            "detector": folder / "features.safetensors",
            "real_training": real,
            **{name: folder / f"{name}.npz" for name in references},
            **frozen,
        }

    def make_detector(self, path: Path, fashion: Fashion) -> Detector:
        """The detector in `path`, trained now where it is missing."""
        if is_main() and not path.exists():
            network = train_features(fashion.train_images, fashion.train_labels, steps=self.feature_steps)
            right = accuracy(network, fashion.heldout_images, fashion.heldout_labels)
            if right < LEAST_ACCURACY:
                raise UserError(
                    f"the classifier, in whose features distances are measured, gets {100 * right:.1f} % of the "
                    f"held-out images right, fewer than {100 * LEAST_ACCURACY:.0f} %: the data are not Fashion-MNIST"
                )
            write_checkpoint(path, network.state_dict(), metadata={"heldout_accuracy": right})
        barrier()
        return read_detector(path, CPU)

    def make_reference(self, path: Path, detector: Detector, backbone: Backbone, images: Tensor) -> None:
        """Statistics of `images`, redrawn."""
        if is_main() and not path.exists():
            statistics = FeatureStatistics(detector.num_features)
            for part in images.split(500):
                statistics.update(detector(self.redraw(backbone, part))["features"])
            write_reference(path, Reference.from_statistics(statistics))
        barrier()
