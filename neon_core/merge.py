"""theta_neon = theta_base - w (theta_syn - theta_base): for tensors, state dicts and a live module.

Files, folders and adapters: `neon_run.merging`. `python -m neon_core.merge` is the command `neon merge`.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from neon_files.checkpoint import describe_mismatch, is_finite
from neon_files.errors import UserError
from neon_files.names import match_names
from neon_files.quantized import find_quantized

# Measured, not trained: an extrapolated variance may become negative, and the directions of spectral norm (the
# last pattern, of torch's parametrization) are no unit vectors any more.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "parametrizations.*._[uv]")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_FRACTIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *_FLOAT8, torch.complex64, torch.complex128)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_WHOLE = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, *_SIGNED)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (`*`, `?`, `[abc]`) fits `name` or its part behind a dot or slash.

    `norm.*` fits `norm.weight` and `block.0.norm.weight`, not `prenorm.weight`.
    """
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*[./]{pattern}") for pattern in patterns)


def extrapolate(base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The paper's merge of one tensor, in the dtype of `base`; 16 and 8 bits are computed in float32."""
    if w == 0:
        return base.clone()  # bit for bit, also where base is -0.0 or syn overflows the difference
    exact = torch.float32 if base.dtype in _FLOAT8 else torch.promote_types(base.dtype, torch.float32)
    theta_base, theta_syn = base.to(exact), syn.to(base.device, exact)
    theta_neon = theta_base - w * (theta_syn - theta_base)
    if base.dtype in _FLOAT8:  # which saturate where other types overflow to infinity
        theta_neon = theta_neon.where(theta_neon.abs() <= torch.finfo(base.dtype).max, torch.nan)
    return theta_neon.to(base.dtype)


def neon_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """`extrapolate` for numbers with a fraction; whole numbers, and masks (-inf, equal in both), stay as in the base.

    Raises UserError naming the tensor where either side is no plain tensor of numbers, where only one has fractions,
    and where either side, or the result, is otherwise not finite.
    """
    for side, tensor in (("base", base), ("synthetic", syn)):
        check_plain(name, tensor, f"the {side} checkpoint")
    if (base.is_floating_point(), base.is_complex()) != (syn.is_floating_point(), syn.is_complex()):
        raise UserError(
            f"{name}: {base.dtype} in the base, {syn.dtype} in the synthetic checkpoint; convert one of them"
        )
    if base.dtype not in _FRACTIONS:
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


def check_plain(name: str, tensor: Tensor, place: str) -> None:
    """UserError where `tensor` is no dense tensor of numbers, but codes, one rank's shard or without data."""
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = f"a {type(tensor).__name__}"  # DTensor, and the classes in which libraries keep codes with their scales
    elif tensor.is_meta:
        kind = "a meta tensor, which has no numbers"
    elif tensor.layout != torch.strided:
        kind = f"a sparse tensor ({tensor.layout})"
    elif tensor.is_quantized or tensor.dtype not in (*_FRACTIONS, *_WHOLE):
        kind = f"a tensor of the type {tensor.dtype}"
    else:
        return
    raise UserError(f"{name}: is {kind} in {place}; save the network as plain dense tensors first")


Rule = Callable[[str, Tensor, Tensor, float], Tensor]  # name, base, synthetic, w -> merged


def check_quantized(layout: Mapping[str, tuple[torch.dtype, Iterable[int]]], place: str) -> None:
    """UserError where a table name -> (dtype, shape) is of a quantized network: codes and scales, not its numbers."""
    quantized = find_quantized(layout)
    if quantized:
        raise UserError(
            f"{place}: {quantized[0]} holds quantized numbers, whose scale is {quantized[1]}; codes and scales cannot "
            "be merged separately: merge the network in full precision, then quantize"
        )


def neon_merge(
    base: Mapping[str, Tensor], syn: Mapping[str, Tensor], w: float, rule: Rule = neon_rule, keep: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The merged state dict, in new memory.

    Names that fit a pattern of `keep` (see `matches`) are copied from the base, and by the default rule so are
    STATISTICS. Raises UserError naming tensors that are missing, extra, of another shape, quantized or not finite. Any
    rule but the default takes a missing tensor from the base and drops an extra one, as the official scripts do.
    """
    check_w(w)
    syn = _named_like(base, syn)
    keep = (*keep, *STATISTICS) if rule is neon_rule else tuple(keep)
    for side, state in (("the base", base), ("the synthetic checkpoint", syn)):
        check_quantized({name: (value.dtype, value.shape) for name, value in state.items()}, side)
    ours, theirs = ({k: tuple(v.shape) for k, v in side.items() if not matches(k, keep)} for side in (base, syn))
    check_names(rule, ours, theirs)
    with torch.no_grad():
        return {
            name: rule(name, value, syn[name], w) if name in ours and name in theirs else value.clone()
            for name, value in base.items()
        }


def _named_like(names: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under those of `names` that differ only by the parts that DDP, FSDP or torch.compile add."""
    pairs = match_names(names, state)
    return {pairs[name]: value for name, value in state.items()}


def check_w(w: float) -> None:
    if not math.isfinite(w):
        raise UserError(f"w = {w}: must be a finite number; the paper's rows use 0.1 to 3")


def check_names(rule: Rule, base: Mapping[str, tuple[int, ...]], syn: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where the two tables name -> shape do not belong to one network."""
    if rule is not neon_rule:
        base, syn = ({name: side[name] for name in base if name in syn} for side in (base, syn))
    problems = describe_mismatch("the base", base, "the synthetic checkpoint", syn)
    if problems:
        raise UserError(f"the two checkpoints are not of one network: {problems}")


class NeonWeights:
    """A module whose parameters move along theta_base - w (theta_syn - theta_base).

    Every `set` starts from the two given ends, so moving back and forth does not drift, and `set(0)` is the base bit
    for bit. The ends are held by reference in their own dtype (mapped files stay mapped). Buffers (running
    statistics, masks), whole numbers and names that match `keep` come from the base: `kept` names them, for a merge
    of the files.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Mapping[str, Tensor],
        syn: Mapping[str, Tensor],
        keep: Iterable[str] = (),
    ):
        keep = tuple(keep)
        entries: dict[str, Tensor] = dict(module.named_parameters())
        moving = {k: v for k, v in entries.items() if v.dtype in _FRACTIONS and not matches(k, keep)}
        entries |= dict(module.named_buffers())
        base, syn = (_named_like(entries, state) for state in (base, syn))
        self.parameters = moving
        self._fixed = {name: value for name, value in entries.items() if name not in moving and name in base}
        self.kept = tuple(self._fixed)
        _check_fit(module, "base", base, moving | self._fixed)
        _check_fit(module, "synthetic", syn, moving)
        ends, self.syn = self._separate(base, entries), self._separate(syn, moving)
        self.base = {name: ends[name] for name in moving}
        self._base_fixed = {name: ends[name] for name in self._fixed}
        self.w: float | None = None

    def _separate(self, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The ends, none of them in the memory of the live tensors, which `set` overwrites."""
        live = {v.untyped_storage().data_ptr() for v in (*self.parameters.values(), *self._fixed.values())}
        ends = {name: state[name].detach() for name in names if name in state}
        return {k: v.clone() if v.untyped_storage().data_ptr() in live else v for k, v in ends.items()}

    @torch.no_grad()
    def set(self, w: float) -> None:
        """Move the module to `w`. On an error it is back at the base."""
        check_w(w)
        for name, tensor in self._fixed.items():
            tensor.copy_(self._base_fixed[name])
        try:
            for name, parameter in self.parameters.items():
                device = parameter.device
                parameter.copy_(neon_rule(name, self.base[name].to(device), self.syn[name].to(device), w))
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
            exact = torch.complex64 if base.is_complex() else torch.float32
            difference = self.syn[name].to(base.device, exact) - base.to(exact)
            difference = torch.where(torch.isfinite(difference), difference, 0.0)  # masks: inf - inf
            total += difference.abs().square().sum(dtype=torch.float64).item()
        return math.sqrt(total)


def _check_fit(module: nn.Module, side: str, state: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    check_quantized({name: (value.dtype, value.shape) for name, value in state.items()}, f"the {side} checkpoint")
    shapes = {name: tuple(value.shape) for name, value in live.items()}
    present = {name: tuple(state[name].shape) for name in shapes if name in state}
    problems = describe_mismatch("the network", shapes, f"the {side} checkpoint", present)
    if problems:
        raise UserError(f"{type(module).__name__} cannot be moved: {problems}")


if __name__ == "__main__":  # the command lies two floors above; `neon merge` is the same
    runpy.run_module("neon_run.merging.command", run_name="__main__")
