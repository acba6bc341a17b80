"""The training losses of EDM, VP and VE (Karras et al. 2022, section 5 and appendix F.1 with table 1).

    lambda(sigma) (D(y + sigma n; sigma) - y)^2,   per element, not averaged

`loss_map` takes every draw as an argument; a loss object says how a draw becomes a noise level and asks a source of
random numbers for the rest, in this order: the level, the augmentation, n.
Shapes: B batch, C channels, R resolution, K classes, A augment labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from neon_edm.precond import vp_sigma


class Random(Protocol):
    """A source of random tensors on the device where they are used."""

    def randn(self, shape: tuple[int, ...]) -> Tensor: ...
    def rand(self, shape: tuple[int, ...]) -> Tensor: ...
    def randint(self, high: int, shape: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class GeneratorRandom:
    """Draws from one generator; they are made where the generator lives and then moved."""

    generator: torch.Generator
    device: torch.device

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self.device)

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(self.device)

    def randint(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.generator.device).to(self.device)


Augment = Callable[[Tensor, Random], tuple[Tensor, Tensor]]  # (images, random) -> (images, labels [B, A])


def loss_map(
    net: nn.Module,
    y: Tensor,
    sigma: Tensor,
    weight: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """weight (D(y + sigma n; sigma) - y)^2, [B, C, R, R]; sigma and weight [B, 1, 1, 1], n = `noise` like y."""
    D_yn = net(y + sigma * noise, sigma, labels, augment_labels=augment_labels)
    return weight * (D_yn - y) ** 2


@dataclass(frozen=True)
class Loss(ABC):
    """The part that the three share."""

    level_draw: ClassVar[str] = "rand"  # which kind of number becomes the noise level

    @abstractmethod
    def sigma(self, draw: Tensor) -> Tensor:
        """The noise level of a draw."""

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma)."""
        return 1 / sigma**2

    def __call__(
        self, net: nn.Module, images: Tensor, labels: Tensor | None, random: Random, augment: Augment | None = None
    ) -> Tensor:
        """The loss map [B, C, R, R] of float `images` in [-1, 1]; the target is the augmented image."""
        sigma = self.sigma(getattr(random, self.level_draw)((images.shape[0], 1, 1, 1)))  # [B, 1, 1, 1]
        y, augment_labels = (images, None) if augment is None else augment(images, random)
        return loss_map(net, y, sigma, self.weight(sigma), random.randn(tuple(y.shape)), labels, augment_labels)


@dataclass(frozen=True)
class EDMLoss(Loss):
    """ln sigma ~ N(P_mean, P_std^2); lambda makes the effective weight 1 at every level."""

    level_draw: ClassVar[str] = "randn"
    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def sigma(self, draw: Tensor) -> Tensor:
        return (draw * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class VPLoss(Loss):
    """t uniform on (epsilon_t, 1]. The constants are the loss's own, whatever the preconditioner holds."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, draw: Tensor) -> Tensor:
        return vp_sigma(1 + draw * (self.epsilon_t - 1), self.beta_d, self.beta_min)


@dataclass(frozen=True)
class VELoss(Loss):
    """ln sigma uniform between ln sigma_min and ln sigma_max."""

    sigma_min: float = 0.02
    sigma_max: float = 100

    def sigma(self, draw: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** draw


LOSSES: dict[str, type[Loss]] = {"EDMPrecond": EDMLoss, "VPPrecond": VPLoss, "VEPrecond": VELoss}
