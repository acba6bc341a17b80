"""torch.compile of a network's parts, in place, and on a GPU CUDA graphs of its calls. Both are chosen here only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
import torch._dynamo.exc as dynamo
from torch import nn
from torch._dynamo import config

from neon_files.errors import UserError
from neon_run.replay import Recorded

FAILURES = (dynamo.TorchDynamoException, getattr(dynamo, "FailOnRecompileLimitHit", dynamo.TorchDynamoException))
# the second is since torch 2.6 one that is not of the first kind
GRAPHS = 64  # of one kind of module: xAR has up to eight in each precision, a fine-tune its own
LIMIT = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6


def compile_network(
    net: nn.Module, units: Iterable[nn.Module], device: torch.device, *, dynamic: bool, backend: str = "inductor"
) -> None:
    """Each call of a unit of `net` runs as one graph, which equal units share; state-dict names stay. On a GPU
    `net.calls`, through which its sampler goes, records them (see `neon_run.replay`).

    dynamic: one graph serves all shapes; else each has its own. Raises UserError, at the first call, where compilation
    fails.
    """
    setattr(config, LIMIT, max(GRAPHS, getattr(config, LIMIT)))
    for unit in units:
        entry = _entry((type(unit), *((name, x.shape, x.dtype) for name, x in unit.state_dict().items())))
        compiled = torch.compile(entry, fullgraph=True, dynamic=dynamic or None, backend=backend)
        unit._compiled_call_impl = partial(_call, compiled, ref(unit))  # weak: see `Recorded`
    if device.type == "cuda":
        net.calls = Recorded(net)  # type: ignore[assignment]  # no module, nor part of the state dict


@cache
def _entry(kind: tuple[Any, ...]) -> Callable:
    """Where torch enters modules of one kind, a class and shapes. A code object of its own, since torch limits
    the graphs of one: the networks of a process would use up those of `forward`, and torch's own are never entered."""

    def entry(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    entry.__code__ = entry.__code__.replace()
    return entry


def _call(compiled: Callable, unit: ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    try:
        return compiled(unit(), *args, **kwargs)
    except FAILURES as error:
        reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
        raise UserError(f"--compile: this network cannot be compiled here ({reason}); leave --compile out") from error
