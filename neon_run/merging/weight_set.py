"""The merge of one set of weight files (a network in one file or in shards), and of its copies in another form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neon_core.merge import check_names, neon_rule
from neon_files.checkpoint import is_finite, pack_metadata
from neon_files.errors import UserError
from neon_files.guard import reading
from neon_files.names import match_names
from neon_files.safetensors_file import Layout, write_safetensors
from neon_run.merging.steps import Steps
from neon_run.merging.weight_file import Load, WeightFile, Writer, check_writable


@dataclass
class WeightSet:
    """The base's files `ours`, under their `names` in the folder, whose tensors lie anywhere in `others`.

    Raises UserError where the two sets are not of one network.
    """

    place: str  # the folder within the folder; part of the names that patterns fit
    names: Sequence[str]
    ours: Sequence[WeightFile]
    others: Sequence[WeightFile]
    steps: Steps
    layout: Layout = field(default_factory=dict)
    theirs: dict[str, Load] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.ours:
            part.check_flat()
            if part.container == "safetensors":
                check_writable(part.path, part.layout)
        self.layout = {name: entry for part in self.ours for name, entry in part.layout.items()}
        self.theirs = _matched(self.layout, self.ours, self.others)
        shapes = {name: shape for name, (_, shape) in self.layout.items() if not self.keeps(name)}
        theirs = {name: tuple(load().shape) for name, load in self.theirs.items() if not self.keeps(name)}
        check_names(neon_rule, shapes, theirs)

    def pattern_name(self, name: str) -> str:
        """The name that `--w` and `--keep` match: `unet/up_blocks.0.weight`."""
        return name if self.place == "." else f"{self.place}/{name}"

    def keeps(self, name: str) -> bool:
        return self.steps.keeps(self.pattern_name(name))

    def pattern_names(self) -> list[str]:
        return [self.pattern_name(name) for name in self.layout]

    def base(self, name: str) -> Load | None:
        return next((part.loaders[name] for part in self.ours if name in part.loaders), None)

    def merged(self, name: str) -> Tensor:
        load = self.base(name)
        assert load is not None
        if self.keeps(name):
            return load().clone()
        with torch.no_grad():
            return neon_rule(name, load(), self.theirs[name](), self.steps.of(self.pattern_name(name)))

    def writers(self) -> Iterator[tuple[str, Writer]]:
        inputs = {"base": [part.path.name for part in self.ours], "synthetic": [part.path.name for part in self.others]}
        header = pack_metadata(None, {"neon": {**self.steps.record(), "rule": "neon", **inputs}})
        for name, part in zip(self.names, self.ours, strict=True):
            yield name, self._writer(part, header)

    def _writer(self, part: WeightFile, header: Mapping[str, str]) -> Writer:
        def write(path) -> None:
            if part.container == "safetensors":
                write_safetensors(path, part.layout, self.merged, {**part.header, **header})
                return
            state: dict[str, Tensor] = {}
            for group in part.ties:
                if len(group) == sum(name in self.theirs for name in group) and self._tied_in_theirs(group):
                    state |= dict.fromkeys(group, self.merged(group[0]))  # still one tensor
            part.write(path, {name: state[name] if name in state else self.merged(name) for name in part.loaders}, {})

        return write

    def _tied_in_theirs(self, group: Sequence[str]) -> bool:
        return all(torch.equal(self.theirs[name](), self.theirs[group[0]]()) for name in group)

    def copies(self, names: Sequence[str], parts: Sequence[WeightFile]) -> list[tuple[str, Writer]] | None:
        """Writers for copies of this set in another precision or container, derived from the merged weights.

        None where they hold anything but the rounded weights of the base.
        """
        for name, load in (item for part in parts for item in part.loaders.items()):
            ours, copy = self.base(name), load()
            if ours is None or ours().shape != copy.shape or not torch.equal(ours().to(copy.dtype), copy):
                return None
        for part in parts:
            part.check_flat()
        return [(name, self._copy_writer(part)) for name, part in zip(names, parts, strict=True)]

    def _copy_writer(self, part: WeightFile) -> Writer:
        def rounded(name: str) -> Tensor:
            exact, dtype = self.merged(name), part.layout[name][0]
            tensor = exact.to(dtype)
            if is_finite(exact) and not is_finite(tensor):
                raise UserError(f"{part.path}: {name} is merged beyond the range of {dtype}; take the file out")
            return tensor

        record: dict[str, Any] = {**self.steps.record(), "rule": "neon", "rounded_from": list(self.names)}

        def write(path) -> None:
            if part.container == "safetensors":
                header = {**part.header, **pack_metadata(None, {"neon": record})}
                write_safetensors(path, part.layout, rounded, header)
            else:
                part.write(path, {name: rounded(name) for name in part.loaders}, {})

        return write


def _matched(layout: Layout, ours: Sequence[WeightFile], others: Sequence[WeightFile]) -> dict[str, Load]:
    """The tensors of `others` under the names of `layout`. Tied ones may be stored once here and twice there."""
    theirs: dict[str, Load] = {}
    for part in others:
        twice = next((name for name in part.loaders if name in theirs), None)
        if twice:
            raise UserError(f"{part.path}: {twice} is also in another file of its folder; keep one of them")
        theirs |= part.loaders
    for group in (group for part in (*others, *ours) for group in part.ties):
        stored = [name for name in group if name in theirs]
        present = [name for name in group if name in layout]
        if stored:
            theirs |= {name: theirs[stored[0]] for name in present if name not in theirs}
        for extra in (name for name in stored if name not in layout and present):
            if torch.equal(theirs[extra](), theirs[present[0]]()):
                del theirs[extra]
    with reading(others[0].path):
        partner = match_names(layout, theirs)
    return {partner[name]: load for name, load in theirs.items()}
