"""Classifier-free guidance for networks whose labels were dropped at times while they were trained (Ho and Salimans
2022). The paper's EDM rows have none; the small rows search it together with w, for base and Neon alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from neon_edm.backbone import EDMBackbone
from neon_edm.loss import EDMLoss
from neon_edm.precond import EDMPrecond, Precond, build_network
from neon_edm.sampler import Denoiser


class Guided:
    """D(x; sigma) + guidance (D(x; sigma, label) - D(x; sigma)) in one pass: classifier-free guidance (Ho and
    Salimans 2022). The network has learnt the case without a label from the labels that were dropped."""

    def __init__(self, net: Precond, guidance: float):
        self.net, self.guidance = net, guidance
        self.sigma_min, self.sigma_max, self.round_sigma = net.sigma_min, net.sigma_max, net.round_sigma

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None
        both = torch.cat([class_labels, torch.zeros_like(class_labels)])
        labelled, free = self.net(x.repeat(2, 1, 1, 1), sigma, both).chunk(2)
        return free + self.guidance * (labelled - free)


def passes_per_image(settings: Mapping[str, Any]) -> int:
    """Heun's, and twice as many where guidance needs the case without a label."""
    return (2 * settings["num_steps"] - 1) * (1 if settings.get("guidance", 1.0) == 1 else 2)


B = TypeVar("B", bound="GuidedBackbone")


class GuidedBackbone(EDMBackbone):
    """A conditional network with `guidance` among its sampler settings (1: none), and balanced classes."""

    guidance = 1.0  # of the sampler

    def __init__(self, net: Precond, config: dict[str, Any], device: torch.device | str = "cpu", **options: Any):
        assert isinstance(net, EDMPrecond)
        super().__init__(net, config, device, loss=EDMLoss(sigma_data=net.sigma_data), **options)

    @classmethod
    def fresh(cls: type[B], kwargs: dict[str, Any], seed: int) -> B:
        """An EDMPrecond of these arguments with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(build_network("EDMPrecond", kwargs), {"class": "EDMPrecond", "kwargs": kwargs})

    def assign_labels(self, seeds: Sequence[int], **settings: Any) -> Tensor:
        """Class = seed mod K: balanced wherever a range of seeds is, and the columns of a grid of samples."""
        return torch.tensor([seed % self.num_classes for seed in seeds], dtype=torch.int64)

    def sample(self, seeds: Sequence[int], labels: Tensor | None, guidance: float = 1.0, **settings: Any) -> Tensor:
        self.guidance = guidance
        return super().sample(seeds, labels, **settings)

    def denoiser(self) -> Denoiser:
        return self.net if self.guidance == 1 else Guided(self.net, self.guidance)
