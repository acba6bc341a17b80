"""Which rows of the paper's table there are: found in the packages beside this one, none of which is named here.

A package with rows has a module `rows` whose `ROWS` is a sequence of `Row`. It is found by an entry point of the group
`neon.rows` (an installed package), or as a folder */neon_*/ of the checkout that this file lies in.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch

from neon_core.backbone import Backbone, Recipe
from neon_files.errors import UserError
from neon_metrics.detector import Detector

GROUP = "neon.rows"
ROOT = Path(__file__).resolve().parents[1]  # of the checkout


@dataclass(frozen=True)
class Grid:
    """The official search: ascending values, left early where FID rises by more than `tolerance`."""

    ws: tuple[float, ...]
    guidances: tuple[float | None, ...] = (None,)
    tolerance: float = 0.03
    num_images: int = 10_000


class Prepare(Protocol):
    """Makes the files of a row for which nothing is published: a frozen dataclass, whose fields are its settings."""

    training_images: int  # of theta_base, for the ledger

    def __call__(self, row: Row, folder: Path, seed: int) -> Mapping[str, Path]:
        """{"base", "reference"} and, where the row has them, {"detector", "heldout", "real_training"} -> file below
        `folder`, made now or found; goes on with what a killed call left. Every rank calls it. Raises UserError."""
        ...


@dataclass(frozen=True)
class Row:
    """A recipe with the backbone that runs it, and what a search has to know."""

    id: str  # "edm/cifar10_cond"
    recipe: Recipe
    backbone: type[Backbone]
    w_range: tuple[float, float]  # searched, from the paper
    grid: Grid
    base_fid: float | None = None  # in the paper
    neon_fid: float | None = None
    guidance: str | None = None  # the sampler's setting that is searched together with w
    guidance_range: tuple[float, float] | None = None
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the sampler, so that a label depends on its seed only
    tokenizer: str | None = None  # argument of `backbone.load` that takes the frozen tokenizer's file
    files: tuple[str, ...] = ()  # published files that it needs beside base and reference
    tf32: bool = False
    evaluations: Callable[[Mapping[str, Any]], int] | None = None  # network passes per image, guidance counted
    prepare: Prepare | None = None  # instead of published files
    detector: Callable[[Path, torch.device], Detector] | None = None  # reads the file "detector"; None: Inception
    distance: str = "FID"  # what a report calls the distance in that detector's features

    def sampler(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, **self.settings}


def find_rows() -> dict[str, Row]:
    """id -> row, in the order of the packages' names. UserError where two rows have one id."""
    rows: dict[str, Row] = {}
    for module in _modules():
        offered: Sequence[Row] = importlib.import_module(module).ROWS
        for row in offered:
            if row.id in rows:
                raise UserError(f"{module}: a second row with the name {row.id}; give it another one")
            rows[row.id] = row
    return rows


def find_row(name: str) -> Row:
    """By id, or by the part behind the slash where that is unique. UserError with the nearest names."""
    rows = find_rows()
    alike = [key for key in rows if name in (key, key.split("/")[-1])]
    if name in rows or len(alike) == 1:
        return rows[name if name in rows else alike[0]]
    near = alike or difflib.get_close_matches(name, rows, n=3, cutoff=0.3) or list(rows)
    raise UserError(f"{name}: no such row; choose {' or '.join(near)} (`neon rows` lists them all)")


def _modules() -> list[str]:
    """Names of the modules with rows; those of this checkout come first on the path, before older installed ones."""
    found = {}
    if (ROOT / "pyproject.toml").exists():
        for path in sorted(ROOT.glob("*/neon_*/rows.py")):
            package, folder = path.parent.name, str(path.parents[1])
            if folder not in sys.path:
                sys.path.insert(0, folder)
            found[package] = f"{package}.rows"
    for entry in entry_points(group=GROUP):
        module = entry.value.split(":")[0]
        found.setdefault(module.split(".")[0], module)
    return [found[package] for package in sorted(found)]
