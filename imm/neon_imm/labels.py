"""The class of each image of a run, the published file names, and the label listing from such names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.image_store import is_clutter

LABELLED_NAME = re.compile(r"label(\d+)_\d+\.[a-z0-9]+", re.IGNORECASE)


def label_plan(num_images: int, num_classes: int) -> Tensor:
    """int64 [num_images]: the classes in order, each repeated.

    Every class gets num_images // num_classes images; of the remainder, the lowest classes get one more each.
    """
    share, rest = divmod(num_images, num_classes)
    counts = torch.full([num_classes], share)
    counts[:rest] += 1
    return torch.arange(num_classes).repeat_interleave(counts)


def image_name(label: int | None, number: int) -> str:
    """The released naming: label7_000012.png, or sample_000012.png without classes."""
    return f"sample_{number:06d}.png" if label is None else f"label{label}_{number:06d}.png"


def file_order(labels: Tensor) -> np.ndarray:
    """int64 [num_images]: the images of a run with `labels`, in the order in which the official script reads their
    files, which is that of the names as text: label100_ before label10_ before label1_."""
    count: Counter[int] = Counter()
    names = []
    for label in labels.tolist():
        names.append(image_name(label, count[label]))
        count[label] += 1
    return np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)


def labels_from_names(names: Iterable[str]) -> dict[str, list]:
    """{"labels": [[name, class], ...]} of those names that carry a class, sorted by name."""
    matches = ((name, LABELLED_NAME.fullmatch(name)) for name in sorted(names))
    return {"labels": [[name, int(match[1])] for name, match in matches if match]}


def create_labels(folder: str | Path) -> dict[str, list]:
    """Write the listing of a folder's images to its dataset.json and return it.

    Raises UserError where no file name carries a class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of label<class>_<number>.png images")
    files = (path.name for path in folder.iterdir() if path.is_file())
    listing = labels_from_names(name for name in files if not is_clutter(name))
    if not listing["labels"]:
        raise UserError(f"{folder}: no file is named like label7_000012.png, so there are no labels to list")
    with atomic_path(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps(listing, indent=4), encoding="utf-8")
    return listing
