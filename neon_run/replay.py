"""The calls of a network while it samples: as they come, or on a GPU recorded as CUDA graphs and replayed.

A launch costs the CPU some microseconds, and a call of a transformer here has up to a thousand. A CUDA graph launches
them all at once, but reads and writes the addresses of its recording. Hence whatever a call reads beside its inputs
comes from `Calls.hold` or `Calls.stores`, which a recording network keeps in place from one batch to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from neon_core.precision import autocast_dtype, float32_switches
from neon_files.errors import UserError, one_line


class Calls:
    """As they come."""

    def run(
        self, name: Hashable, function: Callable[..., Any], *inputs: Tensor | None, reads: Sequence[Tensor] = ()
    ) -> Any:
        """function(*inputs): a tensor, or a tree of them.

        `name` says all that the function depends on, but its inputs, the weights, and the tensors `reads`, which it
        may also write to. It draws no random numbers and waits for nothing.
        """
        return function(*inputs)

    def hold(self, name: Hashable, tree: Any, dtype: torch.dtype | None = None) -> Any:
        """The tree with its tensors, in `dtype` (None: in theirs)."""
        return tree if dtype is None else tree_map_only(Tensor, lambda x: x.to(dtype), tree)

    def stores(self, name: Hashable, shapes: Sequence[Sequence[int]], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Tensors of any content, for a sampling call, on the device of `like`. All shapes have as many rows."""
        return [like.new_empty(*shape, dtype=dtype) for shape in shapes]


class Recorded(Calls):
    """A kind of call (name, shapes, precision) is recorded the second time that it comes, and replayed from then on:
    what comes once, like the last, smaller batch, is not worth it, and the first call compiles.

    A recording whose weights, or what it `reads`, have moved is made anew; weights that change in place are seen.
    In training nothing is recorded.
    """

    def __init__(self, net: nn.Module):
        # Weak, since the network has this object: the memory of a network that is dropped is free at once, as the next
        # stage needs it, and not when Python next looks for circles.
        self._net = ref(net)
        self._places: dict[Hashable, list[int]] = {}  # of every kind: addresses when it last came
        self._recordings: dict[Hashable, Recording] = {}
        self._held: dict[Hashable, Any] = {}
        self._pool: Any = None  # the memory of all recordings, of which one runs at a time

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def run(
        self, name: Hashable, function: Callable[..., Any], *inputs: Tensor | None, reads: Sequence[Tensor] = ()
    ) -> Any:
        net = self._net()
        if net is None or net.training or torch.is_grad_enabled():
            return function(*inputs)
        described = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in (*inputs, *reads))
        switches = tuple(getattr(place, flag) for place, flag in float32_switches())
        kind = (name, described, autocast_dtype(next(net.parameters()).device), switches)
        places = [x.data_ptr() for x in (*net.parameters(), *net.buffers(), *reads)]
        if self._places.get(kind) != places:
            self._recordings.pop(kind, None)
            output = function(*inputs)
            self._places[kind] = places  # after it: what failed has not come, and may not be compiled yet
            return output
        if kind not in self._recordings:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._recordings[kind] = Recording(function, inputs, self._pool)
        return self._recordings[kind]([x for x in inputs if x is not None])

    def hold(self, name: Hashable, tree: Any, dtype: torch.dtype | None = None) -> Any:
        """A copy at the place of the one before of this name and these shapes."""
        leaves, structure = tree_flatten(tree)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = (name, dtype, tuple((x.shape, x.dtype, x.device) for x in tensors))
        if key not in self._held:
            self._held[key] = [x.to(dtype or x.dtype, copy=True) for x in tensors]
        elif tensors:
            torch._foreach_copy_(self._held[key], tensors)
        kept = iter(self._held[key])
        return tree_unflatten([next(kept) if isinstance(x, Tensor) else x for x in leaves], structure)

    def stores(self, name: Hashable, shapes: Sequence[Sequence[int]], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The first rows of the largest that were asked for."""
        rows = shapes[0][0]
        key = (name, dtype, like.device, tuple(tuple(shape[1:]) for shape in shapes))
        if key not in self._held or len(self._held[key][0]) < rows:
            self._held.pop(key, None)  # first, for its memory
            self._held[key] = super().stores(name, shapes, like, dtype)
        return [store[:rows] for store in self._held[key]]


class Recording:
    """One CUDA graph of `function(*inputs)`. Raises UserError where it cannot be recorded."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor | None], pool: Any):
        own = [None if x is None else x.clone() for x in inputs]
        self._inputs = [x for x in own if x is not None]
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, NCCL's among them, may use the device meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = function(*own)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"--compile: calls of this network cannot be recorded here ({one_line(error)}); leave --compile out"
            ) from error

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._graph.replay()
        return tree_map_only(Tensor, torch.clone, self._output)  # the next replay writes where this one has written
