"""Synthetic images on their way to the tokenizer: enlarged by 1.125, cropped at random, in [-1, 1].

VAR was trained on crops of larger images, so its samples are enlarged before they are cropped (256 -> 288).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ENLARGE = 1.125
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def enlarged_size(height: int, width: int, resolution: int, enlarge: float = ENLARGE) -> tuple[int, int]:
    """(height, width) with a short side of round(enlarge * resolution), the long side truncated."""
    short = round(enlarge * resolution)
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def enlarge(image: Image.Image, resolution: int, factor: float = ENLARGE, flip: bool = False) -> Tensor:
    """uint8 [3, h, w]: RGB (alpha dropped), flipped if asked for, then resized with Lanczos."""
    image = image.convert("RGB")
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = enlarged_size(image.height, image.width, resolution, factor)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def enlarge_batch(images: Tensor, resolution: int) -> Tensor:
    """uint8 [B, 3 or 1, H, W] -> uint8 [B, 3, h, w] on the CPU, as `enlarge`."""
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([enlarge(Image.fromarray(np.ascontiguousarray(array)), resolution) for array in arrays])


def random_crops(images: Tensor, resolution: int, generator: torch.Generator) -> Tensor:
    """[B, C, resolution, resolution], each image cut at a random place, uniform over all places."""
    height, width = images.shape[-2:]
    place: dict[str, Any] = {"size": (len(images),), "generator": generator, "device": generator.device}
    top = torch.randint(0, height - resolution + 1, **place).to(images.device)
    left = torch.randint(0, width - resolution + 1, **place).to(images.device)
    steps = torch.arange(resolution, device=images.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps  # [B, resolution]
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def to_unit_range(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8."""
    return images.float().div(255).mul(2).sub(1)
