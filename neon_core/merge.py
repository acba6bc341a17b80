"""theta_neon = theta_base - w (theta_syn - theta_base): for tensors, state dicts and a live module.

Files, folders and adapters: `neon_run.merging`. `python -m neon_core.merge` is the command `neon merge`.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from neon_files.checkpoint import describe_mismatch, is_finite
from neon_files.errors import UserError


def extrapolate(base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The paper's merge of one tensor, in the dtype of `base`; half precision is computed in float32."""
    if w == 0:
        return base.clone()  # bit for bit, also where base is -0.0 or syn overflows the difference
    exact = torch.promote_types(base.dtype, torch.float32)
    theta_base, theta_syn = base.to(exact), syn.to(base.device, exact)
    theta_neon = theta_base - w * (theta_syn - theta_base)
    return theta_neon.to(base.dtype)


def neon_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """`extrapolate` for numbers with a fraction; whole numbers, and masks (-inf, equal in both), stay as in the base.

    Raises UserError naming the tensor where either side, or the result, is otherwise not finite.
    """
    if not base.is_floating_point():
        return base.clone()
    if not (is_finite(base) and is_finite(syn)):
        if torch.equal(base, syn.to(base.device, base.dtype)):  # false if there is a NaN
            return base.clone()
        culprits = [side for side, tensor in (("base", base), ("synthetic", syn)) if not is_finite(tensor)]
        raise UserError(f"{name}: not finite in the {' and the '.join(culprits)} checkpoint; one of them is broken")
    theta_neon = extrapolate(base, syn, w)
    if not is_finite(theta_neon):
        raise UserError(f"{name}: w = {w:g} leads beyond the range of {base.dtype}; choose a smaller w")
    return theta_neon


Rule = Callable[[str, Tensor, Tensor, float], Tensor]  # name, base, synthetic, w -> merged


def neon_merge(
    base: Mapping[str, Tensor], syn: Mapping[str, Tensor], w: float, rule: Rule = neon_rule, keep: Collection[str] = ()
) -> dict[str, Tensor]:
    """The merged state dict, in new memory; names in `keep` (buffers, say) are copied from the base.

    Raises UserError naming tensors that are missing, extra, of another shape or not finite. Any rule but the default
    takes a missing tensor from the base and drops an extra one, as the official scripts do.
    """
    check_w(w)
    check_names(rule, {k: tuple(v.shape) for k, v in base.items()}, {k: tuple(v.shape) for k, v in syn.items()})
    with torch.no_grad():
        return {
            name: rule(name, value, syn[name], w) if name in syn and name not in keep else value.clone()
            for name, value in base.items()
        }


def check_w(w: float) -> None:
    if not math.isfinite(w):
        raise UserError(f"w = {w}: must be a finite number; the paper's rows use 0.1 to 3")


def check_names(rule: Rule, base: Mapping[str, tuple], syn: Mapping[str, tuple]) -> None:
    """UserError where the two tables name -> shape do not belong to one network."""
    if rule is not neon_rule:
        base, syn = ({name: side[name] for name in base if name in syn} for side in (base, syn))
    problems = describe_mismatch("the base", base, "the synthetic checkpoint", syn)
    if problems:
        raise UserError(f"the two checkpoints are not of one network: {problems}")


class NeonWeights:
    """A module whose parameters move along theta_base - w (theta_syn - theta_base).

    Every `set` starts from the two given ends, so moving back and forth does not drift, and `set(0)` is the base bit
    for bit. The ends are held by reference in their own dtype (mapped files stay mapped), or copied to `device` where
    that is given. Buffers are left alone, whole numbers too.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Mapping[str, Tensor],
        syn: Mapping[str, Tensor],
        device: torch.device | str | None = None,
    ):
        parameters = dict(module.named_parameters())
        self.parameters = {name: value for name, value in parameters.items() if value.is_floating_point()}
        shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        for side, state in (("base", base), ("synthetic", syn)):
            found = {name: tuple(state[name].shape) for name in shapes if name in state}
            problems = describe_mismatch("the network", shapes, f"the {side} checkpoint", found)
            if problems:
                raise UserError(f"{type(module).__name__} cannot be moved: {problems}")
        held = self._apart(base), self._apart(syn)
        if device is not None:
            held = tuple({name: value.to(device) for name, value in state.items()} for state in held)
        self.base, self.syn = held
        self.w: float | None = None

    def _apart(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ends, none of them in the memory of the live parameters, which `set` overwrites."""
        live = {value.untyped_storage().data_ptr() for value in self.parameters.values()}
        ends = {name: state[name].detach() for name in self.parameters}
        return {k: v.clone() if v.untyped_storage().data_ptr() in live else v for k, v in ends.items()}

    @torch.no_grad()
    def set(self, w: float) -> None:
        """Move the module to `w`. On an error it is back at the base."""
        check_w(w)
        try:
            for name, parameter in self.parameters.items():
                ends = (state[name].to(parameter.device) for state in (self.base, self.syn))
                parameter.copy_(neon_rule(name, *ends, w))
        except UserError:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.base[name])
            self.w = 0.0
            raise
        self.w = w

    @torch.no_grad()
    def distance(self) -> float:
        """L2 norm of theta_syn - theta_base over the parameters; `w` times this is the length of the step."""
        total = 0.0
        for name, base in self.base.items():
            difference = self.syn[name].to(base.device, torch.float32) - base.to(torch.float32)
            difference = torch.where(torch.isfinite(difference), difference, 0.0)  # masks: inf - inf
            total += difference.square().sum(dtype=torch.float64).item()
        return math.sqrt(total)


if __name__ == "__main__":  # the command lies two floors above; `neon merge` is the same
    runpy.run_module("neon_run.merging.command", run_name="__main__")
