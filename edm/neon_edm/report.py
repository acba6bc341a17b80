"""How an evaluation is told in one line."""

from __future__ import annotations

from typing import Any

SHORT = {"is_mean": "IS", "kid_mean": "KID"}


def result_line(result: dict[str, Any], num_classes: int) -> str:
    """`FID=1.380000 | conditional | steps=18`, as the official script, and behind it what else was measured."""
    names = ("is_mean", "kid_mean", "precision", "recall", "density", "coverage")
    parts = [f"FID={result['fid']:.6f}"] if "fid" in result else []
    parts += ["conditional" if num_classes else "unconditional", f"steps={result['settings']['num_steps']}"]
    return " | ".join(parts + [f"{SHORT.get(name, name)}={result[name]:.6f}" for name in names if name in result])
