"""The rules of a merge: `neon`, or the official merge of a backbone."""

from __future__ import annotations

from neon_core.merge import Rule, neon_rule
from neon_files.errors import UserError
from neon_run.backbones import find_backbones

NEON = "neon"


def find_rules() -> dict[str, Rule]:
    """`neon`, and `official-<name>` of every backbone whose official merge differs from it."""
    official = {f"official-{b.name}": b.merge_rule for b in find_backbones() if b.merge_rule is not None}
    return {NEON: neon_rule, **official}


def find_rule(name: str) -> Rule:
    """By the name that --rule takes. Raises UserError."""
    if name == NEON:  # without loading any backbone
        return neon_rule
    rules = find_rules()
    if name not in rules:
        raise UserError(f"--rule {name}: unknown; choose one of {', '.join(rules)}")
    return rules[name]
