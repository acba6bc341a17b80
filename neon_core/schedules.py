"""Learning rate and weight averaging as functions of the images seen. Small frozen records, so that they hash."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]  # images seen before the step -> factor of the peak learning rate


@dataclass(frozen=True)
class Constant:
    """Always 1."""

    def __call__(self, images_seen: int) -> float:
        return 1.0


@dataclass(frozen=True)
class LinearRamp:
    """From exactly 0 at the first step to 1 after `images`, then 1: min(n / images, 1)."""

    images: int

    def __call__(self, images_seen: int) -> float:
        return min(images_seen / self.images, 1.0)


@dataclass(frozen=True)
class RampThenCosine:
    """(n + 1 batch) / ramp up to 1, times a half cosine from 1 to 0 over `images`. Used where a base is trained."""

    ramp_images: int
    images: int
    batch_size: int

    def __call__(self, images_seen: int) -> float:
        ramp = min((images_seen + self.batch_size) / self.ramp_images, 1.0)
        return ramp * 0.5 * (1.0 + math.cos(math.pi * min(images_seen / self.images, 1.0)))


@dataclass(frozen=True)
class Ema:
    """Averaging of weights: ema = net + beta (ema - net) after every step, starting from the loaded weights.

    Exactly one of `decay` (beta per step) and `halflife_images` (beta = 0.5^(batch / halflife)) is given.
    `rampup_ratio` caps the half-life at ratio * images seen (Karras et al. 2022). `warmup_steps` caps the decay at
    (1 + i) / (warmup_steps + i) in step i = 0, 1, ...
    """

    decay: float | None = None
    halflife_images: float | None = None
    rampup_ratio: float | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.halflife_images is None):
            raise ValueError("Ema needs exactly one of decay and halflife_images")

    def beta(self, images_seen: int, batch_size: int) -> float:
        """The factor after the step that began at `images_seen`."""
        if self.halflife_images is not None:
            halflife = self.halflife_images
            if self.rampup_ratio is not None:
                halflife = min(halflife, images_seen * self.rampup_ratio)
            beta: float = 0.5 ** (batch_size / max(halflife, 1e-8))
            return beta
        assert self.decay is not None
        if self.warmup_steps is None:
            return self.decay
        step = images_seen // batch_size
        return min(self.decay, (1 + step) / (self.warmup_steps + step))
