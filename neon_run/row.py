"""One row: everything that the stages need to know about one line of the paper's table, or one like it.

The scripts of a backbone and `neon reproduce` read the same object, so they cannot compute different things.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neon_core.backbone import Backbone, TrainSettings
from neon_metrics.detector import Detector
from neon_run.search.quick import Budget


@dataclass(frozen=True)
class Grid:
    """The official search: ascending values, ended early where FID rises by more than `tolerance`."""

    ws: tuple[float, ...]
    settings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of the sampler: the outer loop first
    tolerance: float = 0.03
    num_images: int = 10_000
    refine: float | None = None  # then also the neighbours of the best point at this distance
    first_images: int = 0  # snapshots of fewer images are skipped
    last_images: float = math.inf


class Range(NamedTuple):
    """Where the quick search may go along one axis."""

    low: float
    high: float
    whole: bool = False  # whole numbers only


@dataclass(frozen=True)
class Acceptance:
    """What a row claims of its distances, each as a ratio to the base at its own best settings; fixed before the runs
    that are held against it."""

    neon: float  # Neon: at most
    self_trained: float  # at least
    controls: float  # a random direction, and away from a fine-tune on real data, of Neon's length: at least


@dataclass(frozen=True)
class Protocol:
    """The numbers of images that a reproduction measures, and what its result is held against."""

    ranking_images: int = Budget.ranking_images  # per setting of the search
    deciding_images: int = Budget.deciding_images  # of its best two
    control_images: int | None = None  # None: as many as decide
    controls_twice: bool = False  # at Neon's settings of the sampler and at the base's own best; the lower one counts
    fresh_blocks: int = 1  # of seeds that no search has seen, each as many as the evaluation has
    acceptance: Acceptance | None = None


class Prepare(typing.Protocol):
    """Creates the files of a row without published ones: a frozen dataclass, whose fields are its settings."""

    @property
    def training_images(self) -> int:
        """Of theta_base, for the ledger."""
        ...

    def __call__(self, row: Row, folder: Path, seed: int) -> Mapping[str, Path]:
        """{"base", "reference"} and, where the row has them, {"detector", "heldout", "real_training", "longer"} -> file
        below `folder`; continues a killed call. "longer" is the base after more training, as an opponent.

        Every rank calls it. Raises UserError.
        """
        ...


@dataclass(frozen=True)
class Row:
    """See the module. Paths are relative to the checkout; seed lists are written like "0-9999,20000"."""

    id: str  # "edm/cifar10_cond": the backbone's folder and the row's name
    backbone: type[Backbone]
    # The synthetic set
    num_synthetic: int  # |S|, images
    generate: Mapping[str, Any]  # sampler settings that make S
    # The fine-tune and the merge
    train: TrainSettings
    w: float  # merge weight: theta_base - w (theta_syn - theta_base)
    # The evaluation
    evaluate: Mapping[str, Any]  # sampler settings for the FID
    # Files
    base: str = ""  # theta_base: path or URL
    fid_stats: str = ""  # reference statistics: path or URL
    load: Mapping[str, Any] = field(default_factory=dict)  # options of `backbone.load` that go with `base`
    load_training: Mapping[str, Any] = field(default_factory=dict)  # further ones, of the fine-tune only
    # Seeds of images: those of S and of the evaluation have none in common
    synthetic_seed: int = 0  # S has this one and those that follow
    evaluate_seeds: str = "1000000-1049999"
    subfolders: bool = True  # of S: one for every thousand seeds
    # How it is computed
    batch_size: int = 64  # images sampled at once by one process
    tf32: str = "none"  # where float32 may be rounded to TF32 while sampling: none, conv or all
    generate_tf32: str | None = None  # the same while S is made, where that differs
    train_tf32: str = "none"  # the same of the fine-tune
    micro_batch_multiple: int = 1  # of the fine-tune's loss, with the row's settings
    evaluations: Callable[[Mapping[str, Any]], int] | None = None  # network passes per image, guidance counted
    # The search
    grid: Grid = field(default_factory=lambda: Grid((0.0, 0.5, 1.0, 1.5, 2.0)))
    w_range: tuple[float, float] = (0.0, 3.0)
    axes: Mapping[str, Range] = field(
        default_factory=dict
    )  # up to three of `evaluate`, searched with w: guidance first
    # The paper
    base_fid: float | None = None
    neon_fid: float | None = None
    aliases: tuple[str, ...] = ()  # other names that --preset takes
    # Rows that create the files that others fetch
    prepare: Prepare | None = None
    detector: Callable[[Path, torch.device], Detector] | None = None  # reads the file "detector"; None: Inception
    distance: str = "FID"  # the name of the distance in that detector's features
    protocol: Protocol = Protocol()

    @property
    def name(self) -> str:
        """ "cifar10_cond": the part of the id behind the slash."""
        return self.id.split("/")[-1]
