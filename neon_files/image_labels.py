"""The label of each image of a set: from the set's `dataset.json`, else from the folder right above the image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from neon_files.errors import UserError, and_more
from neon_files.foreign import parse_json
from neon_files.image_store import is_clutter

MAX_CLASSES = 100_000  # ImageNet-21k has 21,841
_NUMBERED = re.compile(r"\D*?(\d+)(_label\d+)?\.\w+")  # 000123_label7.png, img00000123.png, img-mean-std-00000123.npy


def labels_of_listing(data: bytes, names: Sequence[str], source: str) -> np.ndarray | None:
    """int64 [n] classes or float [n, width] vectors of `names`, from the bytes of {"labels": [[name, label], ...]};
    None where its "labels" is null.

    UserError naming `source` and the entry for any other form, an image without label, and a label without image.
    """
    content = parse_json(data, source)
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{source} is not a JSON object with "labels"; write {{"labels": [["name.png", 7], ...]}}')
    entries = content["labels"]
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f'{source}: "labels" is no list; write {{"labels": [["name.png", 7], ...]}}')
    table: dict[str, Any] = {}
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f'{source}: the entry {_short(entry)} is not of the form ["name.png", label]')
        name = entry[0].replace("\\", "/")
        if name in table and table[name] != entry[1]:
            raise UserError(f"{source}: {name} has two labels, {_short(table[name])} and {_short(entry[1])}")
        table[name] = entry[1]
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(f"{source} has no label for {missing[0]}{and_more(missing)}")
    absent = sorted(name for name in table.keys() - set(names) if not is_clutter(name))
    if absent:
        raise UserError(f"{source} lists {absent[0]}{and_more(absent)}, not in the set; it is not whole, or its "
            "listing is of another one")  # fmt: skip
    return _array([table[name] for name in names], names, source)


def _array(labels: list, names: Sequence[str], source: str) -> np.ndarray:
    """Whole numbers, or vectors of one width."""
    if isinstance(labels[0], list):
        width = len(labels[0])
        for name, label in zip(names, labels, strict=True):
            if not isinstance(label, list) or len(label) != width or not all(map(_is_number, label)):
                raise UserError(f"{source}: the label of {name} is no vector of {width} finite numbers")
        return np.array(labels, dtype=np.float64).reshape(len(labels), width)
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(f"{source}: the label of {name} is {_short(label)}; a class is a whole number from 0 to "
                            f"{MAX_CLASSES - 1}")  # fmt: skip
    return np.array(labels, dtype=np.int64)


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 53) or (type(value) is float and math.isfinite(value))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."


def labels_of_folders(names: Sequence[str], source: str) -> np.ndarray | None:
    """int64 [n]: the folder right above each image, numbered in the order of the folders' names as strings.

    None where there are fewer than two, and where folders only number the images (000000/000123.png). UserError where
    some images lie deeper than others: the class is then ambiguous.
    """
    depths: dict[int, str] = {}
    for name in names:
        depths.setdefault(name.count("/"), name)
    if len(depths) > 1:
        low, deep = depths[min(depths)], depths[max(depths)]
        raise UserError(f"{source}: {low} and {deep} lie at different depths, so the folders name no classes; keep "
                        "every image right below the folder of its class, or write a dataset.json")  # fmt: skip
    folders = [name.rsplit("/", 2)[-2] if "/" in name else "" for name in names]
    kinds = sorted(set(folders))
    if len(kinds) < 2 or all(map(_is_numbering, folders, names)):
        return None
    number = {folder: i for i, folder in enumerate(kinds)}
    return np.array([number[folder] for folder in folders], dtype=np.int64)


def _is_numbering(folder: str, name: str) -> bool:
    """Whether the folder's name is the thousand of the file's number."""
    match = _NUMBERED.fullmatch(name.rpartition("/")[2])
    if not match or not folder.isascii() or not folder.isdigit() or len(match[1]) > 18:
        return False
    n = int(match[1])
    return folder in (f"{n - n % 1000:06d}", f"{n // 1000:05d}")
