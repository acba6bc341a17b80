"""Names of tensors: removing the parts that wrappers add, and matching the names of two state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from neon_files.guard import Unfit

# Of torch.compile, FSDP and activation checkpointing; ordinary modules have no such names.
_ALWAYS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
T = TypeVar("T")


def without_counter(state: dict[str, T]) -> dict[str, T]:
    """`state` without the counter that torch's AveragedModel keeps beside the names of its module."""
    others = {name: value for name, value in state.items() if name != "n_averaged"}
    return others if others and all(name.startswith("module.") for name in others) else state


def unwrapped(state: dict[str, T]) -> dict[str, T]:
    """`state` without the parts that wrappers add: `_ALWAYS` in any position, DDP's `module.` where all names have it.

    Raises Unfit where two names become one.
    """
    renamed = {bare: state[_only(names, bare)] for bare, names in _grouped(state, _without_wrappers).items()}
    depth = min((_leading_modules(name) for name in renamed), default=0)
    return {name[len("module.") * depth :]: value for name, value in renamed.items()}


def match_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Name of theirs -> the name of ours that means the same tensor, itself where there is none; in their order.

    A name that both sides have is left alone. Of the others, parts that wrappers add (`module`, `_orig_mod`,
    `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, wherever they stand), then also Lightning's leading `model.`,
    are disregarded on both sides. Raises Unfit where two names of one side then become one.
    """
    ours, theirs = list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))
    both = set(ours) & set(theirs)
    pairs = {name: name for name in theirs}
    ours_left, theirs_left = ([name for name in side if name not in both] for side in (ours, theirs))
    for bare in (_without_wrappers, _without_module, _without_model):
        if not ours_left or not theirs_left:
            break
        table, others = _grouped(ours_left, bare), _grouped(theirs_left, bare)
        matched = {_only(others[key], key): _only(table[key], key) for key in others if key in table}
        pairs |= matched
        ours_left = [name for name in ours_left if name not in set(matched.values())]
        theirs_left = [name for name in theirs_left if name not in matched]
    return pairs


def _leading_modules(name: str) -> int:
    """How often the name begins with `module.`."""
    return next(i for i, part in enumerate([*name.split(".")[:-1], ""]) if part != "module")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ALWAYS)


def _without_module(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ALWAYS and part != "module")


def _without_model(name: str) -> str:
    return _without_module(name).removeprefix("model.")


def _grouped(names: Iterable[str], bare: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(bare(name), []).append(name)
    return groups


def _only(names: list[str], bare: str) -> str:
    if len(names) > 1:
        raise Unfit(f"{names[0]} and {names[1]} both mean {bare} without the parts that wrappers add; keep one")
    return names[0]
