"""The contract for the digits: EDM's backbone with a small network inside and 17 grey levels outside.

Preconditioner, sampler, loss, loading and label rows are EDM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_edm.backbone import EDMBackbone
from neon_edm.loss import EDMLoss
from neon_edm.precond import UNETS, Precond, build_network
from neon_edm.quickstart.denoiser import DigitsDenoiser
from neon_edm.quickstart.digits import IMG_SIZE, NUM_CLASSES, grey_levels, levels_to_uint8, to_unit_range
from neon_edm.sampler import Denoiser

NETWORK = {  # the arguments of EDMPrecond and, after model_type, of the denoiser
    "img_resolution": IMG_SIZE,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "sigma_data": 0.75,  # the digits' standard deviation, 0.751
    "model_type": "DigitsDenoiser",
    "label_dropout": 0.1,
}

UNETS["DigitsDenoiser"] = DigitsDenoiser  # so that the preconditioner finds it by the name in a checkpoint


class Guided:
    """D(x; sigma) + guidance (D(x; sigma, label) - D(x; sigma)) in one pass: classifier-free guidance (Ho and
    Salimans 2022). The network has learnt the case without a label from the labels that were dropped."""

    def __init__(self, net: Precond, guidance: float):
        self.net, self.guidance = net, guidance
        self.sigma_min, self.sigma_max, self.round_sigma = net.sigma_min, net.sigma_max, net.round_sigma

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        both = torch.cat([class_labels, torch.zeros_like(class_labels)])
        labelled, free = self.net(x.repeat(2, 1, 1, 1), sigma, both).chunk(2)
        return free + self.guidance * (labelled - free)


def passes_per_image(settings: Mapping[str, Any]) -> int:
    """Heun's, and twice as many where guidance needs the case without a label."""
    return (2 * settings["num_steps"] - 1) * (1 if settings.get("guidance", 1.0) == 1 else 2)


class DigitsBackbone(EDMBackbone):
    """As EDMBackbone; `on_passes` is called with the number of network passes after each piece of work, a forward pass
    counting 1 and a training step 3 per image, so that one progress bar can follow a whole run."""

    guidance = 1.0  # of the sampler; 1: none
    on_passes: Callable[[int], None] = staticmethod(lambda passes: None)

    def __init__(self, net: Precond, config: dict[str, Any], device: torch.device | str = "cpu", **options: Any):
        super().__init__(net, config, device, loss=EDMLoss(sigma_data=net.sigma_data), **options)

    @classmethod
    def create(cls, seed: int) -> DigitsBackbone:
        """With random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(build_network("EDMPrecond", NETWORK), {"class": "EDMPrecond", "kwargs": NETWORK})

    def assign_labels(self, seeds: Sequence[int], **settings: Any) -> Tensor:
        """Class = seed mod 10: balanced wherever a range of seeds is, and the columns of the sample grid."""
        return torch.tensor([seed % self.num_classes for seed in seeds], dtype=torch.int64)

    def sample(self, seeds: Sequence[int], labels: Tensor | None, guidance: float = 1.0, **settings: Any) -> Tensor:
        """uint8 [B, 1, 8, 8] in the 17 grey levels of the real digits: the nearest one to EDM's 256."""
        self.guidance = guidance
        images = super().sample(seeds, labels, **settings)
        self.on_passes(len(seeds) * passes_per_image({"guidance": guidance, **settings}))
        return levels_to_uint8(grey_levels(images))

    def denoiser(self) -> Denoiser:
        return self.net if self.guidance == 1 else Guided(self.net, self.guidance)

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 -> the exact grey level in [-1, 1]."""
        return to_unit_range(prepared)

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        loss = super().self_training_loss(x, labels, generator)
        self.on_passes(3 * len(x))
        return loss

    def data_order(self, num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        """Drawn with replacement."""
        rng = np.random.default_rng(seed)
        while True:
            yield rng.integers(num_items, size=batch_size)
