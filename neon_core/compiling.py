"""torch.compile of a network's parts, in place. Its mode is chosen here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo.exc as dynamo
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from neon_files.errors import UserError

FAILURES = (dynamo.TorchDynamoException, getattr(dynamo, "FailOnRecompileLimitHit", dynamo.TorchDynamoException))
# the second is since torch 2.6 one that is not of the first kind


def compile_calls(
    modules: Iterable[nn.Module], device: torch.device, *, static: bool, backend: str = "inductor"
) -> None:
    """Each call of a module runs as one graph, which equal modules share; state-dict names stay.

    static: the shapes of a call stay, except in a last, smaller batch, and it writes into none of its inputs. Then a
    GPU replays it as a CUDA graph where no gradient is wanted. Else one graph serves all shapes. Raises UserError, at
    the first call, where compilation fails.
    """
    options: dict[str, Any] = {"fullgraph": True, "dynamic": None if static else True, "backend": backend}
    for module in modules:
        entry = _entry((type(module), *((name, x.shape, x.dtype) for name, x in module.state_dict().items())))
        plain = torch.compile(entry, **options)
        replayed = plain
        if static and device.type == "cuda":
            replayed = torch.compile(entry, mode="reduce-overhead", **options)
        module._compiled_call_impl = partial(_call, plain, replayed, module)


@cache
def _entry(kind: tuple[Any, ...]) -> Callable:
    """Where torch enters modules of one kind, a class and shapes. A code object of its own, since torch keeps eight
    graphs of one: the networks of a process would use up those of `forward`, and torch's own are never entered."""

    def entry(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    entry.__code__ = entry.__code__.replace()
    return entry


def _call(plain: Callable, replayed: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        if replayed is plain or torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # The next replay writes where this one has written: the caller keeps a copy.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, replayed(*args, **kwargs))
    except FAILURES as error:
        reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
        raise UserError(f"--compile: this network cannot be compiled here ({reason}); leave --compile out") from error
