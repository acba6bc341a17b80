"""A training set in memory as one file in EDM's layout: PNGs and dataset.json in a .zip."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import PIL.Image
from torch import Tensor

from neon_files.atomic import atomic_path


def write_image_zip(path: Path, images: Tensor, labels: Tensor) -> None:
    """uint8 [N, 1, H, W] and int64 [N]; equal images give an equal file."""
    names = [f"{i:05d}_label{int(label)}.png" for i, label in enumerate(labels)]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            encoded = io.BytesIO()
            PIL.Image.fromarray(image[0].numpy()).save(encoded, format="png")
            archive.writestr(zipfile.ZipInfo(name), encoded.getvalue())  # without a date
        entries = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": entries}))
