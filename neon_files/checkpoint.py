"""Checkpoints: read from any published container, loaded strictly, written as safetensors with their provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neon_files.containers import Weights, open_weights
from neon_files.distributed_checkpoint import is_distributed
from neon_files.errors import UserError, say
from neon_files.guard import reading
from neon_files.manifest import find_file
from neon_files.names import match_names
from neon_files.safetensors_file import DTYPE_NAMES, write_safetensors


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file, named as in the network's state dict, on the CPU."""

    path: Path
    container: str  # torch | torch-legacy | pickle | safetensors
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None  # {"class", "kwargs"} (pickles: and "args"), where the file has it
    metadata: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path, entry: str | None = None) -> Checkpoint:
    """The checkpoint in `path`, whatever its container, nesting and prefixes; tensors are mapped where possible.

    Averaged weights are preferred to raw ones, with a note; `entry` names another. Raises UserError for a file
    that is missing (with the command that fetches it), cut short, foreign, or would run code.
    """
    weights = open_checkpoint(path, entry)
    state = {name: load() for name, load in weights.loaders.items()}
    return Checkpoint(weights.path, weights.container, state, weights.config, weights.metadata)


def open_checkpoint(path: str | Path, entry: str | None = None) -> Weights:
    """As `read_checkpoint`, but tensors are loaded one by one."""
    weights = open_weights(find_checkpoint(path), entry)
    for note in weights.notes:
        say(f"{weights.path}: {note}")
    return weights


def read_state(path: str | Path, names: Iterable[str], entry: str | None = None) -> dict[str, Tensor]:
    """The state dict in `path` under those of `names` that differ only by the parts that wrappers add."""
    weights = open_checkpoint(path, entry).named_like(names)
    return {name: load() for name, load in weights.loaders.items()}


def find_checkpoint(path: str | Path) -> Path:
    """`find_file`, which also accepts the folder of a distributed checkpoint."""
    return Path(path) if is_distributed(path) else find_file(path)


def load_strict(
    module: nn.Module, checkpoint: Checkpoint, ignore: Sequence[str] = (), allow_nonfinite: bool = False
) -> None:
    """Copy the checkpoint into `module`; a module on the meta device takes the tensors themselves.

    Every entry of the state dict must be there with its shape, and nothing else but names that begin with one of
    `ignore`; parts of names that wrappers add are disregarded (`match_names`). Numbers take the module's dtype.
    Parameters must be finite, unless `allow_nonfinite`. Raises UserError that lists the mismatches, and then
    leaves the module as it was.
    """
    ours = module.state_dict()
    with reading(checkpoint.path):
        names = match_names(ours, checkpoint.state)
    theirs = {names[name]: value for name, value in checkpoint.state.items()}
    taken = {name: value for name, value in theirs.items() if name in ours}
    problems = describe_mismatch(
        "the network",
        {name: tuple(value.shape) for name, value in ours.items()},
        "the file",
        {
            name: tuple(value.shape)
            for name, value in theirs.items()
            if name in ours or not name.startswith(tuple(ignore))
        },
    )
    if problems:
        raise UserError(f"{checkpoint.path}: does not fit {type(module).__name__}: {problems}")
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = {}
    for name, value in taken.items():
        if name in parameters and not allow_nonfinite and not is_finite(value):
            raise UserError(f"{checkpoint.path}: {name} holds numbers that are not finite; the checkpoint is broken")
        state[name] = _cast(value, ours[name].dtype, name, checkpoint.path)
    assign = any(value.is_meta for value in ours.values())
    module.load_state_dict(state, strict=True, assign=assign)


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity. One pass in the usual case: the sum of finite numbers is finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:  # float8 has no arithmetic
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _cast(value: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    if value.dtype == dtype:
        return value
    if value.is_complex() and not dtype.is_complex:
        raise UserError(f"{path}: {name} holds complex numbers, the network has {dtype}")
    result = value.to(dtype)
    if value.is_floating_point() and not dtype.is_floating_point and not torch.equal(result.to(value.dtype), value):
        raise UserError(f"{path}: {name} should hold whole numbers ({dtype}) but has fractions")
    return result


def describe_mismatch(
    ours_name: str, ours: Mapping[str, tuple], theirs_name: str, theirs: Mapping[str, tuple], limit: int = 3
) -> str:
    """One line on how two tables name -> shape differ; "" where they agree."""
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    shapes = [name for name in ours if name in theirs and tuple(ours[name]) != tuple(theirs[name])]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(ours)} keys missing in {theirs_name} ({_first(missing, limit)})")
    if extra:
        parts.append(f"{len(extra)} keys only in {theirs_name} ({_first(extra, limit)})")
    if shapes:
        differing = [f"{n}: {list(ours[n])} in {ours_name}, {list(theirs[n])} in {theirs_name}" for n in shapes]
        parts.append(f"{len(shapes)} of another shape ({_first(differing, limit, '; ')})")
    return "; ".join(parts)


def _first(names: Sequence[str], limit: int, separator: str = ", ") -> str:
    return separator.join(names[:limit]) + (f"{separator}..." if len(names) > limit else "")


def write_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """`state` as safetensors, atomically; tensors that share memory are written separately.

    `config` ({"class", "kwargs"}) and `metadata` are JSON in the file's header; `read_checkpoint` returns them.
    """
    for name, value in state.items():
        if value.dtype not in DTYPE_NAMES:
            raise UserError(f"{path}: {name} has the type {value.dtype}, which safetensors cannot hold")
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    write_safetensors(path, layout, lambda name: state[name], pack_metadata(config, metadata))


def pack_metadata(config: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Header entries of a safetensors file: text, so every value as JSON."""
    entries = {} if config is None else {"config": dict(config)}
    entries = {**(metadata or {}), **entries}
    return {str(name): json.dumps(value, sort_keys=True, default=_as_json) for name, value in entries.items()}


def _as_json(value: Any) -> Any:
    """Values of pickled networks that JSON cannot hold: sets as lists, the rest by its type."""
    return sorted(value, key=str) if isinstance(value, set) else f"<{type(value).__name__}>"
