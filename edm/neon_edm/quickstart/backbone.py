"""The contract for the digits: EDM's backbone with a small network inside and 17 grey levels outside.

Preconditioner, sampler, loss, loading and label rows are EDM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_edm.guidance import GuidedBackbone, passes_per_image
from neon_edm.quickstart.digits import IMG_SIZE, NUM_CLASSES, grey_levels, levels_to_uint8, to_unit_range

NETWORK = {  # the arguments of EDMPrecond and, after model_type, of the denoiser
    "img_resolution": IMG_SIZE,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "sigma_data": 0.75,  # the digits' standard deviation, 0.751
    "model_type": "PixelPerceptron",
    "label_dropout": 0.1,
}


class DigitsBackbone(GuidedBackbone):
    """As GuidedBackbone; `on_passes` is called with the number of network passes after each piece of work, a forward
    pass counting 1 and a training step 3 per image, so that one progress bar can follow a whole run."""

    on_passes: Callable[[int], None] = staticmethod(lambda passes: None)

    @classmethod
    def create(cls, seed: int) -> DigitsBackbone:
        """With random weights."""
        return cls.fresh(NETWORK, seed)

    def sample(self, seeds: Sequence[int], labels: Tensor | None, guidance: float = 1.0, **settings: Any) -> Tensor:
        """uint8 [B, 1, 8, 8] in the 17 grey levels of the real digits: the nearest one to EDM's 256."""
        images = super().sample(seeds, labels, guidance, **settings)
        self.on_passes(len(seeds) * passes_per_image({"guidance": guidance, **settings}))
        return levels_to_uint8(grey_levels(images))

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
