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


class Launches(TorchDispatchMode):
    """Inside, `launches` counts every operation but views and allocations, and `peak` is the most bytes of tensors on
    the CPU that were made inside and lived at once. Raises TooSlow after `seconds`."""

    def __init__(self, seconds: float | None = None):
        super().__init__()
        self.launches, self.peak, self._live = 0, 0, 0
        self._known: set[int] = set()
        self._end = None if seconds is None else time.monotonic() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._end is not None and time.monotonic() > self._end:
            raise TooSlow
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in SILENT and not func.is_view:
            self.launches += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.device.type == "cpu":
                self._track(x.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
