"""The real images: Fashion-MNIST (Xiao et al. 2017, MIT licence), brought from 28 to 16 pixels a side.

Read from the four files that its authors publish, compressed or not, whichever folder holds them. They come with
Debian's package dataset-fashion-mnist, and torchvision downloads them.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neon_core.distributed import barrier, is_main
from neon_files.downloads import is_offline
from neon_files.errors import UserError, one_line, say
from neon_files.home import cache_dir

IMG_SIZE = 16
NUM_CLASSES = 10
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SOURCE_SIZE = 28
NUM_TRAIN, NUM_HELDOUT = 60_000, 10_000
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
UINT8 = 0x08  # the type code of an idx file
REMEDY = (
    "install Debian's package dataset-fashion-mnist, or torchvision, which downloads them where there is a network, or "
    "name the folder of the four idx files with --data"
)


@dataclass(frozen=True)
class Fashion:
    """Images uint8 [N, 1, 16, 16], labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    heldout_images: Tensor  # for reports only: nothing is trained or selected on them
    heldout_labels: Tensor


def load_fashion(folder: str | Path | None = None) -> Fashion:
    """The data set in `folder`, or where `find_folder` finds it. Every rank calls it. Raises UserError."""
    place = find_folder() if folder is None else Path(folder)
    parts: list[Tensor] = []
    for prefix, count in (("train", NUM_TRAIN), ("t10k", NUM_HELDOUT)):
        images = read_idx(find_file(place, f"{prefix}-images-idx3-ubyte"), (count, SOURCE_SIZE, SOURCE_SIZE))
        labels = read_idx(find_file(place, f"{prefix}-labels-idx1-ubyte"), (count,))
        if labels.max() >= NUM_CLASSES:
            raise UserError(f"{place}: a label is {labels.max()}, and Fashion-MNIST has classes 0 to {NUM_CLASSES - 1}")
        parts += [shrink(torch.from_numpy(images)[:, None]), torch.from_numpy(labels.astype(np.int64))]
    return Fashion(*parts)


def find_folder() -> Path:
    """Debian's folder, or torchvision's, which is downloaded first where it is missing. UserError with the remedies."""
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    root = cache_dir() / "datasets"
    raw = root / "FashionMNIST" / "raw"
    if not raw.is_dir():
        if is_offline() or importlib.util.find_spec("torchvision") is None:
            raise UserError(f"Fashion-MNIST is not on this machine; {REMEDY}")
        if is_main():
            _download(root)
        barrier()
    return raw


def _download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST  # an optional package, which takes seconds to import

    say(f"downloading Fashion-MNIST with torchvision to {root}")
    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Fashion-MNIST could not be downloaded ({one_line(error)}); {REMEDY}") from error


def find_file(folder: Path, name: str) -> Path:
    """`name` or `name`.gz in `folder`. Raises UserError."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder}: holds no {name}.gz, a file of Fashion-MNIST; {REMEDY}")


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of exactly `shape` from an idx file: two zeros, type, number of axes, big-endian sizes, then the numbers.

    Raises UserError where the file is cut, damaged or of another shape.
    """
    header = 4 + 4 * len(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(header + math.prod(shape) + 1)  # a byte more, to see whether there is one
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is cut or damaged ({one_line(error)}); fetch it again") from error
    expected = struct.pack(f">BBBB{len(shape)}I", 0, 0, UINT8, len(shape), *shape)
    sizes = " x ".join(map(str, shape))
    if data[:header] != expected:
        raise UserError(f"{path}: is no idx file of {sizes} bytes, as Fashion-MNIST has; fetch it again")
    if len(data) != header + math.prod(shape):
        raise UserError(f"{path}: holds more or fewer than {sizes} bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def shrink(images: Tensor) -> Tensor:
    """uint8 [N, 1, 28, 28] -> uint8 [N, 1, 16, 16]: black to 32 pixels a side, then the mean of every 2 x 2."""
    parts = [F.avg_pool2d(F.pad(part.float(), (2, 2, 2, 2)), 2).round().to(torch.uint8) for part in images.split(4096)]
    return torch.cat(parts)
