"""Pixels <-> the scaled latents that xAR models: MAR's KL-16 autoencoder, its scale, and the rules for pixels.

Shapes: B images, H W pixels, z latent channels, h w latent grid (16x16).
"""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from neon_core.kl_vae import AutoencoderKL, posterior
from neon_core.pixels import check_finite
from neon_core.precision import frozen_in

SCALE = 0.2325  # latent = SCALE * posterior sample: about unit variance on ImageNet
ROUNDINGS = ("truncate", "round")


def to_uint8(images: Tensor, rounding: str = "truncate") -> Tensor:
    """uint8 of images in [-1, 1], values beyond are clamped; computed in float16 for float16 images, as officially,
    else in float32.

    "truncate" is what Neon's numbers were measured with; "round" (half to even) is the original xAR evaluation, on
    average half a level brighter. Raises NotFiniteImages.
    """
    images = check_finite(images)
    levels = ((images if images.dtype == torch.float16 else images.float()) + 1.0) / 2.0 * 255.0
    if rounding == "round":
        levels = levels.round()
    return levels.clamp(0.0, 255.0).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images."""
    return images.float() / 255.0 * 2.0 - 1.0


def scaled_latent(moments: Tensor, eps: Tensor) -> Tensor:
    """0.2325 (mean + std eps), [B, z, h, w], of moments [B, 2z, h, w] and standard normal eps [B, z, h, w]."""
    return SCALE * posterior(moments).sample(eps)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> [size, size, C], the crop of Dhariwal & Nichol 2021: the short side is halved by box filter
    while it is at least 2 * size, then brought to `size` by bicubic interpolation, then the middle is cut out."""
    picture = PIL.Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), PIL.Image.Resampling.BICUBIC
    )
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]


def decode(
    autoencoder: AutoencoderKL, latents: Tensor, rounding: str = "truncate", precision: str = "fp32", chunk: int = 32
) -> Tensor:
    """uint8 [B, C, H, W] of scaled latents [B, z, h, w], in that precision (see `frozen_in`), `chunk` at a time."""
    with frozen_in(latents.device, precision, autoencoder):
        return to_uint8(autoencoder.decode(latents.float() / SCALE, chunk), rounding)


def both_moments(autoencoder: AutoencoderKL, images: Tensor, chunk: int = 32) -> Tensor:
    """float32 [B, 2, 2z, h, w]: moments of uint8 images [B, C, H, W], and of the same images mirrored."""
    with torch.autocast(images.device.type, enabled=False):
        x = from_uint8(images)
        return torch.stack([autoencoder.encode(x, chunk), autoencoder.encode(x.flip(-1), chunk)], dim=1)
