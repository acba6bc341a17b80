"""The rules that a merge may follow: ours, and what the official scripts compute where it differs."""

from __future__ import annotations

import torch
from torch import Tensor

from neon_core.merge import Rule, neon_rule
from neon_files.errors import UserError

NEON = "neon"


def official_var_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """VAR: in the tensor's own dtype, whole numbers too (to float32); a base tensor with any infinity is kept whole."""
    return base.clone() if torch.isinf(base).any() else base + w * (base - syn)


def official_imm_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """IMM: floating tensors, only the entries that are finite in both."""
    if not base.is_floating_point() or w == 0:
        return base.clone()
    syn = syn.to(base.dtype)
    return torch.where(torch.isfinite(base) & torch.isfinite(syn), base - w * (syn - base), base)


def official_edm_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """EDM: (1 + w) base - w syn for everything."""
    return (1 + w) * base - w * syn


RULES: dict[str, Rule] = {
    NEON: neon_rule,
    "official-var": official_var_rule,
    "official-imm": official_imm_rule,
    "official-edm": official_edm_rule,
}


def find_rule(name: str) -> Rule:
    """By the name that --rule takes. Raises UserError."""
    if name not in RULES:
        raise UserError(f"--rule {name}: unknown; choose one of {', '.join(RULES)}")
    return RULES[name]
