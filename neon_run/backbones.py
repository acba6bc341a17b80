"""The interface of a backbone to the commands, and the list of backbones; none is named here.

A package with rows has a module `commands` whose `COMMANDS` is a `BackboneCommands`. It is discovered by an entry point
of the group `neon.backbones` (an installed package), or as a folder */neon_*/ of the checkout that this file lies in.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from neon_core.backbone import TrainSettings
from neon_core.merge import Rule
from neon_files.errors import UserError
from neon_run.check.parts import CheckParts
from neon_run.row import Row

GROUP = "neon.backbones"
ROOT = Path(__file__).resolve().parents[1]  # of the checkout
Flags = tuple[click.Option, ...]


def plain_line(result: Mapping[str, Any]) -> list[str]:
    """The settings that a result line names, beside the metrics."""
    return [f"{name}={value}" for name, value in result["settings"].items()]


@dataclass(frozen=True)
class BackboneCommands:
    """Rows and flags of one backbone. Flags are grouped by where their values go."""

    name: str  # of the merge rule `official-<name>`, and in messages
    rows: tuple[Row, ...]
    checkpoint: tuple[str, ...]  # spellings of the flag that names a checkpoint
    result_settings: Callable[[Mapping[str, Any]], list[str]] = plain_line  # "cfg=2.7" and the like of a result line
    digits: int = 4  # of metrics in a result line
    metrics: str = "fid,is"  # of calculate_fid, where --metrics is not given; of sweep: fid
    default: str | None = None  # row of generate, finetune and sweep where --preset is not given
    default_fid: str | None = None  # the same of calculate_fid
    without_row: Row | None = None  # the row where --preset is not given and has no default; not trained
    preset: tuple[str, ...] = ()  # further spellings of --preset
    more_presets: Mapping[str, Row] = field(default_factory=dict)  # names of official settings, beside the rows
    base: tuple[str, ...] = ()  # further spellings of the base's flag in finetune and sweep
    synthetic: tuple[str, ...] = ()  # further spellings of --synthetic, which names a fine-tuned checkpoint
    load: Flags = ()  # -> options of `backbone.load`
    load_training: Flags = ()  # -> the same, of finetune only
    sample: Flags = ()  # -> settings of `backbone.sample`: the row's with those given, through `sampler_settings`
    generate: Flags = ()  # -> the same, of generate only
    neutral: Mapping[str, Any] = field(default_factory=dict)  # values of those that leave a setting out
    unbiased: Mapping[str, Any] = field(default_factory=dict)  # sampler settings of the network's own distribution: no
    # guidance, no filter, the noise floor of `neon diagnose`; {}: there are none
    sampler_settings: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda settings, given: settings
    train: Flags = ()  # -> training settings, through `train_settings`, beside the common ones
    train_settings: Callable[[Row, Mapping[str, Any]], TrainSettings] | None = None  # None: the common ones only
    check: Flags = ()  # of finetune: the official script's properties of the network, through `check_claims`
    check_claims: Callable[[Any, Mapping[str, Any]], None] = lambda backbone, claims: None
    # Official flags without a counterpart, unless the command has an option of this spelling.
    ignored: Flags = ()  # accepted without effect; their help is printed as a note
    refused: Mapping[str, str] = field(default_factory=dict)  # spelling -> the flag to give instead
    seed_block: int = 1  # --seed N of generate and calculate_fid: image i has the seed N * seed_block + i
    search_seeds: tuple[str, ...] = ()  # further spellings of sweep's --search_seeds
    final_seeds: tuple[str, ...] = ()  # and of its --final_seeds
    words: Callable[[str, Sequence[str]], list[str]] = lambda stage, words: list(words)  # the official form -> flags
    merge_rule: Rule | None = None  # the official merge, where it differs from ours
    machine_check: CheckParts | None = None  # what `neon check` measures; None: nothing

    def find_row(self, name: str | None, default: str | None, training: bool = False) -> Row:
        """The row that --preset names. Raises UserError, also for `training` without a row: no settings fit any
        network."""
        chosen = name or default
        if chosen is None:
            if self.without_row is not None and not training:
                return self.without_row
            raise UserError(f"--preset is missing; choose one of {', '.join(row.name for row in self.rows)}")
        return self.more_presets.get(chosen) or choose_row(self.rows, chosen, "--preset ")


def find_backbones() -> list[BackboneCommands]:
    """Those of this checkout (first on the path, before older installed ones) and of installed packages."""
    modules = {}
    if (ROOT / "pyproject.toml").exists():
        for path in sorted(ROOT.glob("*/neon_*/commands.py")):
            package, folder = path.parent.name, str(path.parents[1])
            if folder not in sys.path:
                sys.path.insert(0, folder)
            modules[package] = f"{package}.commands"
    for entry in entry_points(group=GROUP):
        module = entry.value.split(":")[0]
        modules.setdefault(module.split(".")[0], module)
    return [importlib.import_module(modules[package]).COMMANDS for package in sorted(modules)]


def find_rows() -> dict[str, Row]:
    """id -> row, in the order of the packages' names. UserError where two rows have one id."""
    rows: dict[str, Row] = {}
    for commands in find_backbones():
        for row in commands.rows:
            if row.id in rows:
                raise UserError(f"{commands.name}: a second row with the name {row.id}; give it another one")
            rows[row.id] = row
    return rows


def backbone_of(row: Row) -> BackboneCommands:
    """The backbone that offers the row."""
    return next(commands for commands in find_backbones() if row in commands.rows)


def find_row(name: str) -> Row:
    """The row of that id, or the only one that the name fits; see `choose_row`."""
    return choose_row(tuple(find_rows().values()), name)


def choose_row(rows: Sequence[Row], name: str, flag: str = "") -> Row:
    """By id, by the part behind the slash, by an alias, or by a part of the id that only one row has.

    UserError with the nearest names where none fits, or several do.
    """
    by_id = {row.id: row for row in rows}
    if name in by_id:
        return by_id[name]
    exact = [row for row in rows if name.lower() in (row.name.lower(), *(alias.lower() for alias in row.aliases))]
    fitting = exact or [row for row in rows if name.lower() in row.id.lower()]
    if len(fitting) == 1:
        return fitting[0]
    near = [row.id for row in fitting] or difflib.get_close_matches(name, by_id, n=3, cutoff=0.3) or list(by_id)
    raise UserError(f"{flag}{name}: {'fits several rows' if fitting else 'no such row'}; choose {' or '.join(near)}")
