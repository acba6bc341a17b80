"""Names of tensors: what wrappers put before or between them, and which names of two sides mean one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from neon_files.guard import Unfit

# torch.compile, FSDP and activation checkpointing; no module of anybody's is called so.
_ALWAYS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
T = TypeVar("T")


def unwrapped(state: dict[str, T]) -> dict[str, T]:
    """`state` without what wrappers add: their own parts wherever they stand, and DDP's `module.` where all have it.

    Raises Unfit where two names become one.
    """
    kept = dict(state)
    if "n_averaged" in kept and all(name.startswith("module.") for name in kept if name != "n_averaged"):
        del kept["n_averaged"]  # the counter of torch's AveragedModel
    renamed = _renamed(kept, _without_wrappers)
    while renamed and all(name.startswith("module.") for name in renamed):
        renamed = {name.removeprefix("module."): value for name, value in renamed.items()}
    return renamed


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
        table = _renamed({name: name for name in ours_left}, bare)
        matched = {
            name: table[key] for key, name in _renamed({n: n for n in theirs_left}, bare).items() if key in table
        }
        pairs |= matched
        ours_left = [name for name in ours_left if name not in set(matched.values())]
        theirs_left = [name for name in theirs_left if name not in matched]
    return pairs


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ALWAYS)


def _without_module(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ALWAYS and part != "module")


def _without_model(name: str) -> str:
    return _without_module(name).removeprefix("model.")


def _renamed(state: dict[str, T], bare: Callable[[str], str]) -> dict[str, T]:
    result: dict[str, T] = {}
    first: dict[str, str] = {}
    for name, value in state.items():
        key = bare(name)
        if key in result:
            raise Unfit(f"{first[key]} and {name} both mean {key}, without what wrappers add; which is unclear")
        result[key], first[key] = value, name
    return result
