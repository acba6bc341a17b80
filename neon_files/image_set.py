"""Image data sets in EDM's layout: a folder or .zip of images (or .npy latents) with a `dataset.json` of labels.

Also read: one folder per class, as ImageNet is kept. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from neon_files.errors import UserError

IN_MEMORY_BYTES = 2 << 30  # a set up to this size is decoded once and kept


class ImageSet:
    """Images and labels by index; items are sorted by name as strings, as the official training code does.

    `max_size` keeps a random subset (drawn with `random_seed`), in order; `xflip` then appends every item mirrored.
    `use_labels=False` ignores labels. Raises UserError for a missing or empty set, an image without label, or images of
    unequal shape.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        use_labels: bool = True,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
    ):
        self.path = Path(path)
        self._zip = _open_zip(self.path) if self.path.suffix.lower() == ".zip" else None
        every = self._zip.namelist() if self._zip else _walk(self.path)
        PIL.Image.init()
        kinds = set(PIL.Image.EXTENSION) | {".npy"}
        self.names = sorted(name for name in every if os.path.splitext(name)[1].lower() in kinds)
        if not self.names:
            raise UserError(f"{self.path}: no images in it; name a folder or .zip of images")
        self._labels = self._read_labels("dataset.json" in every) if use_labels else None
        self.indices = np.arange(len(self.names))
        if max_size is not None and max_size < len(self.names):
            np.random.RandomState(random_seed % (1 << 31)).shuffle(self.indices)
            self.indices = np.sort(self.indices[:max_size])
        self.flipped = np.zeros(len(self.indices), dtype=bool)
        if xflip:
            self.flipped = np.repeat([False, True], len(self.indices))
            self.indices = np.tile(self.indices, 2)
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        self.shape = self._read(self.names[self.indices[0]]).shape  # (C, H, W)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @cached_property
    def label_rows(self) -> np.ndarray:
        """float32 [n, width]: one-hot rows, or the vectors of the file. The width counts every file of the set,
        also those that `max_size` leaves out. Width 0 without labels."""
        if self._labels is None:
            return np.zeros((len(self), 0), dtype=np.float32)
        labels = np.array(self._labels)
        if labels.dtype.kind in "iu" and labels.ndim == 1:
            labels = np.eye(int(labels.max()) + 1, dtype=np.float32)[labels]
        return labels.astype(np.float32)[self.indices]

    @cached_property
    def class_indices(self) -> Tensor | None:
        """int64 [n] class of each item, or None without labels. Raises UserError where labels are vectors."""
        if self._labels is None:
            return None
        labels = np.array(self._labels)
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UserError(f"{self.path}: dataset.json holds label vectors; class numbers are needed here")
        return torch.from_numpy(labels.astype(np.int64)[self.indices])

    @cached_property
    def digest(self) -> str:
        """12 hex digits of the item list: names, subset and flips (not of the pixels)."""
        listing = "\n".join(self.names).encode() + self.indices.tobytes() + self.flipped.tobytes()
        return hashlib.sha256(listing).hexdigest()[:12]

    def arrays(self, items: Sequence[int]) -> np.ndarray:
        """[B, C, H, W] of the named items: uint8 images, or float32 latents; mirrored where the item is a flip."""
        if self._all is not None:
            raw = self._all[self.indices[items]]
        else:
            raw = self._decode(self.indices[items])
        flips = self.flipped[items]
        if flips.any():
            raw[flips] = raw[flips][..., ::-1]
        return raw

    def images(self, items: Sequence[int]) -> Tensor:
        """`arrays` as a tensor on the CPU."""
        return torch.from_numpy(self.arrays(np.asarray(items)))

    @cached_property
    def _all(self) -> np.ndarray | None:
        size = int(np.prod(self.shape)) * len(self.names) * (4 if self.names[0].endswith(".npy") else 1)
        return self._decode(np.arange(len(self.names))) if size <= IN_MEMORY_BYTES else None

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        arrays = list(self._pool.map(self._read, [self.names[i] for i in positions]))
        for name, array in zip((self.names[i] for i in positions), arrays, strict=True):
            if array.shape != self.shape:
                raise UserError(
                    f"{self.path}: {name} has shape {array.shape}, the first image {self.shape}; use one size"
                )
        return np.stack(arrays)

    def _open(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()

    def _read(self, name: str) -> np.ndarray:
        try:
            if name.endswith(".npy"):
                array = np.load(io.BytesIO(self._open(name)), allow_pickle=False)
                return array.reshape(-1, *array.shape[-2:])
            with PIL.Image.open(io.BytesIO(self._open(name))) as image:
                array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{self.path}: {name} cannot be read as an image ({error}); make it again") from error
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _read_labels(self, has_listing: bool) -> list | None:
        if has_listing:
            try:
                entries = json.loads(self._open("dataset.json")).get("labels")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{self.path}: dataset.json is not a JSON object ({error})") from error
            if entries is None:
                return None
            table = {name.replace("\\", "/"): label for name, label in entries}
            missing = [name for name in self.names if name not in table]
            if missing:
                raise UserError(
                    f"{self.path}: dataset.json has no label for {missing[0]} and {len(missing) - 1} others"
                )
            return [table[name] for name in self.names]
        folders = [name.split("/")[0] if "/" in name else None for name in self.names]
        if None in folders or len(set(folders)) < 2:
            return None
        classes = {folder: number for number, folder in enumerate(sorted(set(folders)))}
        return [classes[folder] for folder in folders]


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; make the set with the backbone's generate.py") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a zip archive, or cut short; make it again") from error


def _walk(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; make the set with the backbone's generate.py")
    found = []
    for folder, _, files in os.walk(root):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        found += [file if inside == "." else f"{inside}/{file}" for file in files]
    return found
