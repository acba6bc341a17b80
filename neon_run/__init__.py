"""Whole runs: rows of the paper, and `improve` for a generator of one's own."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["improve"]


def __getattr__(name: str) -> Any:
    """`improve`, imported when it is asked for: what only downloads or merges needs no training loop."""
    if name == "improve":
        return importlib.import_module("neon_run.improvement").improve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
