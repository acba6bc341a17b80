"""Kernels and copies that a piece of work asks of a device, and the bytes of tensors that live meanwhile."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# No kernel: allocations, and what only changes how a storage is looked at (views are known by their schema).
SILENT = {
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "resize_",
        "detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias", "set_",
    )
} | {"prim::device"}  # fmt: skip


class TooSlow(Exception):
    """The work did not end in the seconds that it was given."""


class Memory:
    """`live`: bytes of the storages that it was shown and that are not freed; `peak`: the most at once."""

    def __init__(self) -> None:
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Launches(TorchDispatchMode):
    """Inside, `launches` counts every operation but views and allocations, and `memory` the tensors on the CPU that are
    made. Raises TooSlow after `seconds`."""

    def __init__(self, seconds: float | None = None):
        super().__init__()
        self.launches, self.memory = 0, Memory()
        self._end = None if seconds is None else time.monotonic() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._end is not None and time.monotonic() > self._end:
            raise TooSlow
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in SILENT and not func.is_view:
            self.launches += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.device.type == "cpu":
                self.memory.see(x.untyped_storage())
        return out
