"""Image data sets in EDM's layout: a folder or .zip of images (or .npy latents) with a `dataset.json` of labels.

Also read: one folder per class, as ImageNet is kept, and its `train/` where there are splits. Nothing is decoded before
An item is
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neon_files import picture
from neon_files.errors import UserError, and_more, one_line, say
from neon_files.foreign import npy_header, npy_numbers, parse_json
from neon_files.image_labels import labels_of_folders, labels_of_listing
from neon_files.image_store import Inside, Store, open_store

IN_MEMORY_BYTES = 2 << 30  # a set up to this size is decoded once and kept
LISTING_BYTES = 1 << 20, 1 << 16  # dataset.json may have: in any case, and for each image (a vector of 1,000 is 20 KB)
MAX_LISTING_BYTES = 1 << 29
SPLITS = {"train", "val", "valid", "validation", "test"}
AGAIN = "run the same generate command again, which makes what is missing"
CHUNK = 256  # items that are decoded together


class ImageSet:
    """Images and labels by index; items are sorted by name as strings, as the official training code does.

    `max_size` keeps a random subset (drawn with `random_seed`), in order; `xflip` then appends every item mirrored.
    `use_labels=False` ignores labels; they are read at first use. Grey images among colour ones
    become RGB. Raises UserError for a missing, empty or unfinished set, for one with fewer images than its manifest
    says, and later for an image that cannot be read, has another shape, or has no label.
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
        self._store, self.names = _images(open_store(self.path), self.path)
        self.manifest = self._read_manifest()
        self._use_labels = use_labels
        self.indices = np.arange(len(self.names))
        if max_size is not None and max_size < len(self.names):
            np.random.RandomState(random_seed % (1 << 31)).shuffle(self.indices)
            self.indices = np.sort(self.indices[:max_size])
        self.flipped = np.zeros(len(self.indices), dtype=bool)
        if xflip:
            self.flipped = np.repeat([False, True], len(self.indices))
            self.indices = np.tile(self.indices, 2)
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        first = self._read(self.names[self.indices[0]])
        self.shape, self.dtype = first.shape, first.dtype  # (C, H, W)
        if self.shape[0] == 1 and self.dtype == np.uint8 and self._has_colour():
            self.shape = (3, *self.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @cached_property
    def label_rows(self) -> np.ndarray:
        """float32 [n, width]: one-hot rows, or the vectors of the file. The width counts every file of the set,
        also those that `max_size` leaves out. Width 0 without labels."""
        labels = self._labels
        if labels is None:
            return np.zeros((len(self), 0), dtype=np.float32)
        chosen = labels[self.indices]
        if labels.ndim == 2:
            return chosen.astype(np.float32)
        rows = np.zeros((len(self), int(labels.max()) + 1), dtype=np.float32)
        rows[np.arange(len(self)), chosen] = 1
        return rows

    @cached_property
    def class_indices(self) -> Tensor | None:
        """int64 [n] class of each item, or None without labels. Raises UserError where labels are vectors."""
        if self._labels is None:
            return None
        if self._labels.ndim != 1:
            raise UserError(f"{self.path}: dataset.json holds label vectors; class numbers are needed here")
        return torch.from_numpy(self._labels[self.indices])

    @cached_property
    def digest(self) -> str:
        """12 hex digits of the content: of the manifest, which holds all settings and a digest of the images, or
        without one, of every item's size and time (in a .zip: size and checksum); of the labels' file; and of names,
        subset and flips."""
        if self.manifest:
            content = [self._store.read("manifest.json")]
        else:
            content = [stamp.encode() for stamp in self._store.stamps(self.names)]
        content += [self._listing] if self._listing else []
        listing = "\n".join(self.names).encode() + self.indices.tobytes() + self.flipped.tobytes()
        return hashlib.sha256(b"\n".join([listing, *content])).hexdigest()[:12]

    def arrays(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """[B, C, H, W] of the named items: uint8 images, or float32 latents; mirrored where the item is a flip."""
        if self._all is not None:
            raw = self._all[self.indices[items]]
        else:
            raw = self._decode(self.indices[items])
        flips = self.flipped[items]
        if flips.any():
            raw[flips] = raw[flips][..., ::-1]
        return raw

    def images(self, items: Sequence[int] | np.ndarray) -> Tensor:
        """`arrays` as a tensor on the CPU."""
        return torch.from_numpy(self.arrays(np.asarray(items)))

    def check(self, items: Sequence[int]) -> None:
        """UserError where one of the named items cannot be read or has another shape."""
        for start in range(0, len(items), CHUNK):
            self.arrays(np.asarray(items[start : start + CHUNK]))

    @cached_property
    def _all(self) -> np.ndarray | None:
        size = int(np.prod(self.shape)) * len(self.names) * self.dtype.itemsize
        return self._decode(np.arange(len(self.names))) if size <= IN_MEMORY_BYTES else None

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        names = [self.names[i] for i in positions]
        out = np.empty((len(names), *self.shape), self.dtype)
        for row, name, array in zip(out, names, self._pool.map(self._read, names), strict=True):
            if array.dtype != self.dtype:
                raise UserError(f"{self.path}: {name} holds {array.dtype}, the first item {self.dtype}; use one kind")
            grey_as_colour = (1, *self.shape[1:]) == array.shape and self.shape[0] == 3 and array.dtype == np.uint8
            if array.shape != self.shape and not grey_as_colour:
                raise UserError(
                    f"{self.path}: {name} has shape {array.shape}, the first image {self.shape}; use one size"
                )
            row[:] = array
        return out

    def _read(self, name: str) -> np.ndarray:
        """[C, H, W]."""
        try:
            data = self._store.read(name)
            if name.lower().endswith(".npy"):
                file = io.BytesIO(data)
                shape, fortran, dtype = npy_header(file, len(data))
                if (dtype.kind != "f" and dtype != np.uint8) or len(shape) not in (2, 3):
                    raise ValueError(f"it holds {dtype} {list(shape)}, not [C, H, W] of pixels (uint8) or latents")
                array = npy_numbers(file, shape, fortran, dtype)
                return array.reshape(-1, *array.shape[-2:])
            with picture.open_picture(data) as image:
                return picture.pixels(image)
        except Exception as error:  # foreign bytes: decoders raise many kinds
            text = f"{self.path}: {name} cannot be read as an image ({one_line(error)}); replace or remove it"
            raise UserError(text) from error

    def _has_colour(self) -> bool:
        """Whether any image of a set that begins with a grey one is not grey, by the headers."""
        if self.manifest:  # generated by one network
            return False

        def is_colour(name: str) -> bool:
            try:
                with picture.open_picture(self._store.read(name)) as image:
                    return picture.channels(image) == 3
            except Exception:  # reported when it is read
                return False

        chunks = (self.names[start : start + CHUNK] for start in range(0, len(self.names), CHUNK))
        return any(any(self._pool.map(is_colour, chunk)) for chunk in chunks)

    @cached_property
    def _labels(self) -> np.ndarray | None:
        """int64 [all items] or float64 [all items, width]."""
        if not self._use_labels:
            return None
        if self._listing is not None:
            return labels_of_listing(self._listing, self.names, f"{self.path}: dataset.json")
        deeper = next((name for name in self._store.names if name.endswith("/dataset.json")), None)
        if deeper:
            raise UserError(f"{self.path}: its dataset.json lies deeper, at {deeper}; name the folder that holds it")
        return labels_of_folders(self.names, str(self.path))

    @cached_property
    def _listing(self) -> bytes | None:
        """The bytes of dataset.json."""
        least, per_image = LISTING_BYTES
        return self._side_file("dataset.json", min(least + per_image * len(self.names), MAX_LISTING_BYTES))

    def _side_file(self, name: str, max_bytes: int) -> bytes | None:
        if name not in self._store.names:
            return None
        try:
            return self._store.read(name, max_bytes)
        except Exception as error:  # foreign bytes
            raise UserError(f"{self.path}: {name} cannot be read ({one_line(error)}); make it again") from error

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest of a generated set, None for any other set. UserError where images are missing."""
        data = self._side_file("manifest.json", 1 << 26)
        manifest = None if data is None else parse_json(data, f"{self.path}: manifest.json")
        if not isinstance(manifest, dict) or not str(manifest.get("format")).startswith("neon-synthetic-set"):
            return None
        if "dataset.json" not in self._store.names:
            raise UserError(f"{self.path}: this synthetic set was not finished; {AGAIN}")
        count = manifest.get("num_images")
        if count != len(self.names):
            more = isinstance(count, int) and count < len(self.names)
            remedy = "remove those that are not of the set" if more else AGAIN
            raise UserError(f"{self.path}: holds {len(self.names)} images, its manifest.json says {count}; {remedy}")
        return manifest


def _images(store: Store, path: Path) -> tuple[Store, list[str]]:
    """The store of the set itself, and the sorted names of its images. UserError where there are none."""
    pictures = picture.suffixes()
    kinds = pictures | {".npy"}
    while True:
        names = sorted(name for name in store.names if os.path.splitext(name)[1].lower() in kinds)
        if not names and "manifest.json" in store.names:
            raise UserError(f"{path}: this synthetic set was not finished; {AGAIN}")
        if not names:
            raise UserError(f"{path}: no images in it; name a folder or .zip of images")
        inner = _set_inside(store, names, path)
        if inner is None:
            break
        store = Inside(store, inner)
    latents = [name for name in names if name.lower().endswith(".npy")]
    if 0 < len(latents) < len(names):
        other = next(name for name in names if not name.lower().endswith(".npy"))
        raise UserError(f"{path}: holds images ({other}) and arrays ({latents[0]}); keep one kind in a set")
    ignored = picture.other_suffixes()
    others = [name for name in store.names if os.path.splitext(name)[1].lower() in ignored]
    if others:
        say(f"{path}: ignored, not in a readable image format: {others[0]}{and_more(others)}")
    return store, names


def _set_inside(store: Store, names: list[str], path: Path) -> str | None:
    """The folder that holds the set: `train` beside other splits, or the only one, where the listing lies in it."""
    if "dataset.json" in store.names:
        return None
    tops = {name.split("/")[0] for name in names if "/" in name}
    if "train" in tops and len(tops) > 1 and tops <= SPLITS:
        say(f"{path}: its train/ is used, {', '.join(sorted(tops - {'train'}))} left out")
        return "train"
    only = next(iter(tops)) if len(tops) == 1 and all("/" in name for name in names) else None
    return only if only and f"{only}/dataset.json" in store.names else None
