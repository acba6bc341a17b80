"""A set of images as the moments of their latents, in the released zip: the data of the row's fine-tune.

    00000/img-mean-std-00000000.npy      float32 [2C, h, w], mean | std; one folder per thousand images
    dataset.json                         {"labels": [[member, class], ...]} or {"labels": null}

`neon_files.image_set.ImageSet` reads it back.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar
from neon_imm.latents import Codec


def member_name(number: int) -> str:
    """12345 -> "00012/img-mean-std-00012345.npy"."""
    digits = f"{number:08d}"
    return f"{digits[:5]}/img-mean-std-{digits}.npy"


def write_latent_zip(dest: str | Path, moments: Iterator[Tensor], labels: Sequence[int] | None) -> int:
    """Store moments (float32 [2C, h, w] each) uncompressed in `dest`, and return their number. Atomic."""
    dest = Path(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    with atomic_path(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for item in moments:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(item.numpy(), dtype=np.float32), allow_pickle=False)
            names.append(member_name(len(names)))
            archive.writestr(names[-1], buffer.getvalue())
        if labels is not None and len(labels) != len(names):
            raise ValueError(f"{len(names)} items, {len(labels)} labels")
        entries = None if labels is None else [[name, int(k)] for name, k in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    return len(names)


def encode_images(
    source: str | Path, dest: str | Path, codec: Codec, device: torch.device, *, batch_size: int = 16,
    max_images: int | None = None,
) -> int:  # fmt: skip
    """Moments of a folder or .zip of images, in the order of their names, as a zip at `dest`. Returns their number.

    Labels come from the source's dataset.json, else from its class folders. Raises UserError where sizes do not fit.
    """
    images = ImageSet(source)
    if Path(dest).suffix.lower() != ".zip":
        raise UserError(f"--dest {dest}: must end in .zip")
    height, width = images.shape[1:]
    if height != width or height % codec.factor:
        raise UserError(f"{source}: images of {width}x{height} pixels; they must be square, with sides that "
                        f"{codec.factor} divides")  # fmt: skip
    count = len(images) if max_images is None else min(max_images, len(images))
    labels = None if images.class_indices is None else images.class_indices[:count].tolist()

    def moments() -> Iterator[Tensor]:
        for start in progress_bar(range(0, count, batch_size), desc="encode", unit="batch"):
            pixels = images.images(range(start, min(start + batch_size, count)))
            yield from codec.moments(pixels.to(device)).cpu()

    return write_latent_zip(dest, moments(), labels)
