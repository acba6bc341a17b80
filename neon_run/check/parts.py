"""What a backbone brings to `neon check`: its networks at full size without their files, and tiny ones with recorded
outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_run.row import Row

Outputs = Mapping[str, Tensor]


class Make(Protocol):
    """Builds a module with random weights on the device."""

    def __call__(
        self,
        constructor: Callable[..., nn.Module],
        *args: Any,
        memory_format: torch.memory_format = torch.contiguous_format,
        **kwargs: Any,
    ) -> Any: ...


@dataclass(frozen=True)
class CheckParts:
    """See the module."""

    # The row's backbone with all its parts, from `make`; None where only a run of `neon reproduce` describes them.
    untrained: Callable[[Row, torch.device, Make], Backbone | None]
    compile: Callable[[Any], None]  # what --compile does to such a backbone
    tiny: Callable[[torch.device], Outputs]  # of networks and inputs from `numbers`: a few values by name, float32
    recorded: Path  # JSON: what `tiny` gave on a CPU, as `golden.write` left it
