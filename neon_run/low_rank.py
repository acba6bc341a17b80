"""LoRA factors that `improve` trains: the merge acts on the change of a weight, scale up @ down, not on the factors.

A fresh adapter has up = 0, so that any down gives theta_base. With the trained down in it, theta_base differs from
theta_syn by up alone, and theta_base - w (theta_syn - theta_base) is the trained adapter with -w up: exactly linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from neon_files.errors import UserError
from neon_run.merging.lora import is_adapter, read_adapter


@dataclass(frozen=True)
class Factors:
    """Names of the factors of one weight, their scale, and the frozen parameters of its module."""

    down: str
    up: str
    scale: float
    frozen: tuple[str, ...]

    def change(self, state: Mapping[str, Tensor]) -> Tensor:
        """What the adapter adds to the weight, float64 [out, in ...]."""
        down, up = state[self.down].double(), state[self.up].double()
        return self.scale * up.flatten(1) @ down.flatten(1)


def factors_of(net: nn.Module) -> list[Factors]:
    """Those among the trained parameters of `net`; [] without an adapter.

    Raises UserError for adapters of another kind, and for one whose up is not 0: extrapolated, its factors would not
    give the extrapolated weight.
    """
    trained = {name: value.detach() for name, value in net.named_parameters() if value.requires_grad}
    if not is_adapter(trained):
        return []
    found = []
    for module, pair in read_adapter("net", trained).pairs.items():
        if pair.up.any():
            raise UserError(
                f"net: its LoRA is trained already ({pair.names[1]} is not 0); merge it into the weights and add a "
                "fresh one, whose up factors are 0"
            )
        layer = net.get_submodule(module)
        scale = getattr(layer, "scaling", 1.0)
        if isinstance(scale, Mapping):  # peft's, adapter -> scale
            scale = next(value for adapter, value in scale.items() if adapter in pair.names[0].split("."))
        frozen = tuple(f"{module}.{name}" for name, _ in layer.named_parameters() if f"{module}.{name}" not in trained)
        found.append(Factors(*pair.names, scale, frozen))
    return found


def learning_rate(net: nn.Module, factors: list[Factors], step: float) -> float:
    """That at which a step of Adam on up moves the weights by about `step` of their root mean square."""
    state = {name: value.detach() for name, value in net.named_parameters()}
    weight = _mean_square(state[name] for pair in factors for name in pair.frozen)
    down = _mean_square(pair.scale * math.sqrt(len(state[pair.down])) * state[pair.down] for pair in factors)
    return step * math.sqrt(weight / down) if weight and down else step


def with_downs_of(syn: Mapping[str, Tensor], base: Mapping[str, Tensor], factors: list[Factors]) -> dict[str, Tensor]:
    """theta_base, the same network, that differs from theta_syn by the up factors alone."""
    return {**base, **{pair.down: syn[pair.down] for pair in factors}}


def squares(
    base: Mapping[str, Tensor], syn: Mapping[str, Tensor], trained: list[str], factors: list[Factors]
) -> tuple[float, float]:
    """|theta_syn - theta_base|^2 and |theta_base|^2 over the trained weights; of an adapter, over what it adds to."""
    own = {name for pair in factors for name in (pair.down, pair.up)}
    others = [name for name in trained if name not in own]
    frozen = [name for pair in factors for name in pair.frozen]
    moved = _square(syn[name].double() - base[name].double() for name in others)
    return moved + _square(pair.change(syn) for pair in factors), _square(base[name] for name in (*others, *frozen))


def _square(values: Iterable[Tensor]) -> float:
    return sum(value.double().square().sum().item() for value in values)


def _mean_square(values: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for value in values:
        total, count = total + value.double().square().sum().item(), count + value.numel()
    return total / max(count, 1)
