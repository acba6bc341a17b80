"""xAR without an autoencoder to learn: the patches of a small grey image are its latents.

Shapes: B images, H W pixels, s side of a patch, g grid side; s s channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_xar.backbone import XARBackbone, load_net
from neon_xar.vae import from_uint8, to_uint8
from neon_xar.xar import XAR

SCALE = 1.6  # latent = SCALE * pixel in [-1, 1]: unit variance on Fashion-MNIST at 16 px, where pixels deviate by 0.626


class Patches(nn.Module):
    """Pixels <-> latents, without parameters: the channels of a grid position are the pixels of its patch, by row."""

    def __init__(self, side: int):
        super().__init__()
        self.stride, self.embed_dim = side, side**2

    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents [B, s s, g, g] of uint8 images [B, 1, H, W]."""
        return SCALE * F.pixel_unshuffle(from_uint8(images), self.stride)

    def decode(self, latents: Tensor, rounding: str) -> Tensor:
        """uint8 [B, 1, H, W] of scaled latents [B, s s, g, g]. `rounding` as in `to_uint8`: "round" undoes `encode`."""
        return to_uint8(F.pixel_shuffle(latents.float() / SCALE, self.stride), rounding)


class PatchXAR(XARBackbone):
    """xAR on the pixels of grey images. The set itself is what is kept, and no file is frozen beside the network."""

    def __init__(self, net: XAR, flip: bool = False):
        side = net.img_size // net.grid
        if net.channels != side**2:
            raise UserError(
                f"the network has tokens of {net.channels} channels, and a patch {side}x{side} pixels; a network of an "
                "autoencoder's latents needs another row (--preset)"
            )
        super().__init__(net, Patches(side), flip=flip)
        self.prepared_key = ""

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device,
        *,
        vae_path: Path | None = None,
        compiled: bool = False,
        flip: bool = False,
        entry: str | None = None,
    ) -> PatchXAR:
        """Weights of `checkpoint`, which records its network, in eval mode. Raises UserError."""
        if vae_path is not None:
            raise UserError(f"--vae_path {vae_path}: this row's network sees pixels; leave the flag out")
        return cls(load_net(checkpoint, device, compiled=compiled, entry=entry), flip)

    @classmethod
    def frozen_files(cls, checkpoint: Path, **options: Any) -> dict[str, Path]:
        return {}

    def check_set(self, images: ImageSet) -> None:
        shape = (1, self.img_size, self.img_size)
        if images.shape != shape:
            raise UserError(f"{images.path}: images of shape {images.shape}, but this network makes {shape}")

    def check_network(self, *, decoder_precision: str = "auto", **settings: Any) -> None:
        if decoder_precision != "auto":
            raise UserError(
                f"--decoder_precision {decoder_precision}: this network makes pixels and has no decoder; leave it out"
            )

    def precisions(self, **settings: Any) -> dict[str, str]:
        return {"network": super().precisions(**settings)["network"]}

    def decode(self, latents: Tensor, rounding: str, precision: str = "fp32") -> Tensor:
        return self.autoencoder.decode(latents, rounding)

    def prepare(self, images: Tensor) -> Tensor:
        """The images, uint8 [B, 1, H, W]."""
        return images

    def through_tokenizer(self, images: Tensor) -> None:
        """None: patches are the pixels themselves."""

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents [B, s s, g, g], of the image or, with `flip` half of the time, its mirror image."""
        mirrored = self.draw_mirrored(len(prepared), generator)
        return self.autoencoder.encode(torch.where(mirrored[:, None, None, None], prepared.flip(-1), prepared))
