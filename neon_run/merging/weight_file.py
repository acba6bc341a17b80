"""One weight file among others: opened under the names that its neighbours know, merged, written in its container."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.distributed import print0
from neon_core.merge import check_names, neon_rule
from neon_files.atomic import atomic_path
from neon_files.checkpoint import open_checkpoint, pack_metadata
from neon_files.errors import UserError
from neon_files.safetensors_file import DTYPE_NAMES, read_header, write_safetensors
from neon_run.merging import lora

Load = Callable[[], Tensor]
Writer = Callable[[Path], None]  # writes one file of the result to the path it is given


@dataclass
class WeightFile:
    """One weight file, opened. Names are those in the file where it is safetensors."""

    path: Path
    container: str = ""
    loaders: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # tied tensors that the file names but does not hold
    header: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = open_checkpoint(self.path)
        self.container, self.loaders = weights.container, weights.loaders
        if self.container == "safetensors":
            names, self.header = read_header(self.path)  # as they are: an index or another library knows them so
            self.loaders = dict(zip(names, weights.loaders.values(), strict=True))
            self.aliases = {k: v for k, v in self.header.items() if k not in self.loaders and v in self.loaders}
        elif self.container == "pickle":
            raise UserError(f"{self.path}: is a pickled network, which is not written again; convert it to safetensors")

    @cached_property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        found = {}
        for name, load in self.loaders.items():
            tensor = load()
            if self.container == "safetensors" and tensor.dtype not in DTYPE_NAMES:
                raise UserError(f"{self.path}: {name} has the type {tensor.dtype}, which we cannot write")
            found[name] = (tensor.dtype, tuple(tensor.shape))
        return found

    @cached_property
    def ties(self) -> list[list[str]]:
        """Groups of names of one tensor: told by a safetensors header, or by shared memory in a torch file."""
        if self.container == "safetensors":
            return [[alias, kept] for alias, kept in self.aliases.items()]
        places: dict[tuple, list[str]] = {}
        for name, load in self.loaders.items():
            tensor = load()
            if tensor.numel():
                start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
                places.setdefault((*start, tensor.shape, tensor.stride()), []).append(name)
        return [names for names in places.values() if len(names) > 1]

    @cached_property
    def adapter_config(self) -> dict[str, Any] | None:
        path = self.path.with_name(lora.CONFIG)
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path}: is not JSON ({error}); mend it") from error

    def state(self) -> dict[str, Tensor]:
        return {name: load() for name, load in self.loaders.items()}

    def adapter(self) -> lora.Adapter:
        found = lora.read_adapter(str(self.path), self.state(), self.adapter_config, self.header)
        if not found.scales_known:
            print0(f"{self.path}: says no alpha; taken as equal to the rank, as loaders do", file=sys.stderr)
        return found

    def write(
        self, path: Path, state: Mapping[str, Tensor], header: Mapping[str, str], safetensors: bool = False
    ) -> None:
        """`state` in this file's container, or as safetensors."""
        if safetensors or self.container == "safetensors":
            layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
            write_safetensors(path, layout, lambda name: state[name], dict(header))
        else:
            with atomic_path(path) as temporary:
                torch.save(dict(state), temporary)


def plain_writers(
    names: Sequence[str], ours: Sequence[WeightFile], others: Sequence[WeightFile], w: float
) -> dict[str, Writer]:
    """Writers, by `names`, for the base's files `ours`, whose tensors lie anywhere in `others`; rule `neon`.

    Raises UserError where the two sets are not of one network.
    """
    shapes = {name: shape for part in ours for name, (_, shape) in part.layout.items()}
    theirs = _matched(shapes, ours, others)
    check_names(neon_rule, shapes, {name: tuple(load().shape) for name, load in theirs.items()})
    inputs = {"base": [part.path.name for part in ours], "synthetic": [part.path.name for part in others]}
    header = pack_metadata(None, {"neon": {"w": w, "rule": "neon", **inputs}})
    return {name: _plain_writer(part, theirs, w, header) for name, part in zip(names, ours, strict=True)}


def _matched(shapes: Mapping[str, tuple], ours: Sequence[WeightFile], others: Sequence[WeightFile]) -> dict[str, Load]:
    """The tensors of `others` under the names of `shapes`. Tied ones may be stored once here and twice there."""
    theirs: dict[str, Load] = {}
    for part in others:
        twice = next((name for name in part.loaders if name in theirs), None)
        if twice:
            raise UserError(f"{part.path}: {twice} is also in another file of its folder; which one counts is unclear")
        theirs |= part.loaders
    for group in (group for part in (*others, *ours) for group in part.ties):
        stored = [name for name in group if name in theirs]
        wanted = [name for name in group if name in shapes]
        if stored:
            theirs |= {name: theirs[stored[0]] for name in wanted if name not in theirs}
        for extra in (name for name in stored if name not in shapes and wanted):
            if torch.equal(theirs[extra](), theirs[wanted[0]]()):
                del theirs[extra]
    return theirs


def _plain_writer(part: WeightFile, theirs: Mapping[str, Load], w: float, header: dict[str, str]) -> Writer:
    def merged(name: str) -> Tensor:
        with torch.no_grad():
            return neon_rule(name, part.loaders[name](), theirs[name](), w)

    def write(path: Path) -> None:
        if part.container == "safetensors":
            write_safetensors(path, part.layout, merged, {**part.header, **header})
            return
        state: dict[str, Tensor] = {}
        for group in part.ties:
            if all(torch.equal(theirs[name](), theirs[group[0]]()) for name in group):
                state |= dict.fromkeys(group, merged(group[0]))  # still one tensor
        part.write(path, {name: state[name] if name in state else merged(name) for name in part.loaders}, {})

    return write
