"""Synthetic images on their way to the tokenizer: enlarged by 1.125, cropped at random, in [-1, 1].

VAR was trained on crops of larger images, so its own samples are enlarged before they are cropped (256 -> 288).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon_files.errors import UserError

ENLARGE = 1.125
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def enlarged_size(height: int, width: int, resolution: int, enlarge: float = ENLARGE) -> tuple[int, int]:
    """(height, width) with a short side of round(enlarge * resolution), the long side truncated."""
    short = round(enlarge * resolution)
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def enlarge(image: Image.Image, resolution: int, factor: float = ENLARGE, flip: bool = False) -> Tensor:
    """uint8 [3, h, w]: RGB (alpha dropped), flipped if wanted, then resized with Lanczos."""
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
    """[B, C, resolution, resolution], each image cut at its own place, uniform over all places."""
    height, width = images.shape[-2:]
    place = {"size": (len(images),), "generator": generator, "device": generator.device}
    top = torch.randint(0, height - resolution + 1, **place).to(images.device)
    left = torch.randint(0, width - resolution + 1, **place).to(images.device)
    steps = torch.arange(resolution, device=images.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps  # [B, resolution]
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def center_crop_offset(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(top, left) of the middle; half margins round to even."""
    return round((height - resolution) / 2), round((width - resolution) / 2)


def crop(images: Tensor, offset: tuple[int, int], resolution: int) -> Tensor:
    """[..., resolution, resolution] at (top, left)."""
    top, left = offset
    return images[..., top : top + resolution, left : left + resolution]


def to_unit_range(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8."""
    return images.float().div(255).mul(2).sub(1)


def list_class_folders(root: Path, classes: Sequence[str] | None = None) -> list[tuple[Path, int]]:
    """(file, label) of every picture in `root/<class>/**`: classes and files in string order, label = class position.

    Raises UserError where there is no class folder, or one without a picture.
    """
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if classes is None else list(classes)
    if not names:
        raise UserError(f"{root}: no class folders in it")
    items = []
    for label, name in enumerate(names):
        walk = sorted({path.parent for path in (root / name).rglob("*") if path.is_file()})
        found = [
            path
            for folder in walk
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name.lower().endswith(EXTENSIONS)
        ]
        if not found:
            raise UserError(f"{root / name}: no picture in this class folder ({' '.join(EXTENSIONS)})")
        items += [(path, label) for path in found]
    return items
