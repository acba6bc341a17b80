"""Pixels <-> samples of the model: scaled latents of a KL autoencoder (ImageNet) or plain pixels (CIFAR-10).

Shapes: B batch, C channels of the sample, H W pixels, h w latent grid. Pixels are uint8. "moments" are mean | std on
the channels, [B, 2C, h, w]: deterministic, so they are cached for each image; a latent is drawn from them at every
visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from neon_core.kl_vae import AutoencoderKL, posterior
from neon_core.pixels import check_finite
from neon_core.precision import frozen_in

# Per-channel statistics of the unscaled latents over ImageNet, from the published configuration.
SD_VAE_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
SD_VAE_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1], truncated: the published decoder's rule. Raises NotFiniteImages."""
    return (check_finite(images).float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)


class Codec(Protocol):
    """The conversion between pixels and samples, for both kinds of model."""

    channels: int  # of the sample
    factor: int  # pixels per sample position, each way

    def moments(self, pixels: Tensor) -> Tensor:
        """uint8 [B, c, H, W] -> float32, the cached item per image."""
        ...

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """`moments` -> a clean sample [B, C, h, w] for the loss."""
        ...

    def decode(self, x: Tensor, precision: str = "fp32") -> Tensor:
        """A clean sample [B, C, h, w] -> uint8 pixels [B, c, H, W]."""
        ...


class VaeCodec:
    """Latents of `vae`, shifted and scaled per channel to mean `final_mean` and standard deviation `final_std`.

    `vae` needs encode(images) -> mean | log-variance and decode(z); its factor 0.18215 is not used. It runs in
    chunks of `chunk` images.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        raw_mean: Sequence[float] = SD_VAE_MEAN,
        raw_std: Sequence[float] = SD_VAE_STD,
        final_mean: float = 0.0,
        final_std: float = 0.5,
        chunk: int = 8,
        factor: int = 8,
    ):
        self.vae, self.chunk, self.factor = vae, chunk, factor
        self.channels = len(raw_mean)
        self.scale = torch.tensor(final_std, dtype=torch.float32) / torch.tensor(raw_std, dtype=torch.float32)
        self.bias = final_mean - torch.tensor(raw_mean, dtype=torch.float32) * self.scale

    def _per_channel(self, like: Tensor) -> tuple[Tensor, Tensor]:
        scale, bias = (v.to(like.device)[:, None, None] for v in (self.scale, self.bias))
        return scale, bias

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] (one channel is repeated) -> float32 mean | std [B, 2C, h, w], unscaled."""
        images = pixels.float() / 127.5 - 1
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        parts = []
        for part in images.split(self.chunk):
            gaussian = posterior(self.vae.encode(part))
            parts.append(torch.cat([gaussian.mean, gaussian.std], dim=1))
        return torch.cat(parts)

    def scale_moments(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w] from mean | std and standard normal noise [B, C, h, w]."""
        mean, std = moments.chunk(2, dim=1)
        scale, bias = self._per_channel(moments)
        return (mean + noise * std) * scale + bias

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean = moments[:, : self.channels]
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device)
        return self.scale_moments(moments, noise.to(moments.device))

    def unscale(self, latents: Tensor) -> Tensor:
        """The input of the VAE's decoder. Subtract, then divide: the released order, for equal rounding."""
        scale, bias = self._per_channel(latents)
        return (latents - bias) / scale

    @torch.no_grad()
    def decode(self, x: Tensor, precision: str = "fp32") -> Tensor:
        """uint8 [B, 3, H, W] of latents [B, C, h, w], in that precision: see `frozen_in`."""
        parts = self.unscale(x).split(self.chunk)
        with frozen_in(x.device, precision, self.vae):
            return to_pixels(torch.cat([self.vae.decode(part) for part in parts]))


class RgbCodec:
    """Pixels themselves, in [-1, 1]."""

    factor = 1

    def __init__(self, channels: int = 3):
        self.channels = channels

    def moments(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 127.5 - 1

    def draw(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        return moments

    def decode(self, x: Tensor, precision: str = "fp32") -> Tensor:
        return (check_finite(x).float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
