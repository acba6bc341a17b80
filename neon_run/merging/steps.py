"""The w of each tensor: one for all, others by patterns of names, and the tensors that are kept from the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neon_core.merge import STATISTICS, check_names, check_w, matches, neon_rule
from neon_files.errors import UserError, say


@dataclass(frozen=True)
class Steps:
    """The w of every tensor by its name; patterns as in `matches`. Raises UserError where a w is not finite."""

    w: float
    blocks: tuple[tuple[str, float], ...] = ()  # (pattern, w); the last match counts
    keep: tuple[str, ...] = ()  # patterns of tensors that come from the base
    buffers: frozenset[str] = frozenset()  # the same by exact names, of a loaded network
    statistics: bool = True  # running statistics come from the base

    def __post_init__(self) -> None:
        for w in (self.w, *(w for _, w in self.blocks)):
            check_w(w)

    @property
    def plain(self) -> bool:
        """One w for all, as the official rules need it."""
        return not (self.blocks or self.keep or self.buffers)

    def keeps(self, *names: str) -> bool:
        """Whether the tensor of these names is kept from the base."""
        patterns = (*self.keep, *(STATISTICS if self.statistics else ()))
        return any(name in self.buffers or matches(name, patterns) for name in names)

    def of(self, *names: str) -> float:
        """The w of the tensor of these names (a file's, a module's)."""
        if self.keeps(*names):
            return 0.0
        fitting = [w for pattern, w in self.blocks if any(matches(name, (pattern,)) for name in names)]
        return fitting[-1] if fitting else self.w

    def check_used(self, names: Iterable[str]) -> None:
        """UserError for a pattern that fits none of `names`: misspelled, or for another network."""
        names = list(names)
        flags = [*(("--w", pattern) for pattern, _ in self.blocks), *(("--keep", pattern) for pattern in self.keep)]
        for flag, pattern in flags:
            if not any(matches(name, (pattern,)) for name in names):
                raise UserError(f"{flag} {pattern}: fits no tensor; there are {', '.join(names[:3])}, ...")

    def record(self) -> dict[str, Any]:
        """The record of the steps in a header."""
        return {
            "w": self.w,
            **({"w_by_pattern": [list(block) for block in self.blocks]} if self.blocks else {}),
            **({"keep": list(self.keep)} if self.keep else {}),
        }

    def say_kept(self, place: Any, names: Iterable[str]) -> None:
        """Report the tensors that come from the base."""
        kept = [name for name in names if self.keeps(name)]
        if kept:
            some = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
            say(f"{place}: {len(kept)} tensors kept from the base ({some})")

    def merge(self, base: Mapping[str, Tensor], syn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged state dict by the rule `neon`, in new memory. Raises UserError as `neon_merge`."""
        moving = ({k: tuple(v.shape) for k, v in side.items() if not self.keeps(k)} for side in (base, syn))
        check_names(neon_rule, *moving)
        with torch.no_grad():
            return {
                name: value.clone() if self.keeps(name) else neon_rule(name, value, syn[name], self.of(name))
                for name, value in base.items()
            }


def steps_of(net: nn.Module, w: float) -> Steps:
    """`w` for the parameters of `net`, whose buffers come from the base: as NeonWeights moves it."""
    return Steps(w, buffers=frozenset(name for name, _ in net.named_buffers()))


def as_steps(w: float | Steps, **changes: Any) -> Steps:
    return replace(w, **changes) if isinstance(w, Steps) else Steps(w, **changes)
