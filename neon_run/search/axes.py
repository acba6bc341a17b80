"""--axis: the settings of the sampler that the quick search varies together with w."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from neon_files.errors import UserError
from neon_run.row import Range, Row
from neon_run.search.quick import Budget

MOST = len(Budget.settings) - 1


def chosen_axes(row: Row, texts: Sequence[str], options: Sequence[click.Option]) -> dict[str, Range]:
    """The axes that `texts` name, those of the row first: NAME=LOW:HIGH, or NAME with the row's own range.

    `options` are the flags of the sampler, whose types say what a setting may be. Raises UserError.
    """
    axes: dict[str, Range] = {}
    for text in texts:
        name, _, limits = text.partition("=")
        if name in axes:
            raise UserError(f"--axis {text}: {name} is named twice")
        types = {option.name: option.type for option in options}
        if name not in types and name not in row.evaluate:
            raise UserError(f"--axis {text}: no such setting of the sampler; {row.id} has {', '.join(row.evaluate)}")
        if name not in row.evaluate:
            raise UserError(
                f"--axis {text}: {row.id} does not set {name}, so a search has no place to begin; it sets "
                f"{', '.join(row.evaluate)}"
            )
        if limits:
            whole = type(row.evaluate[name]) is int
            axes[name] = _range(text, limits, types.get(name, click.INT if whole else click.FLOAT))
        elif name in row.axes:
            axes[name] = row.axes[name]
        else:
            raise UserError(f"--axis {text}: {row.id} has no range for it; write {name}=LOW:HIGH")
        for end in axes[name][:2]:
            row.backbone.check_settings(**{**row.evaluate, name: end})
    if len(axes) > MOST:
        raise UserError(f"--axis: {', '.join(axes)} are {len(axes)} settings; at most {MOST} can be searched at once")
    return {name: axes[name] for name in sorted(axes, key=lambda name: name not in row.axes)}


def check_varied(kind: str) -> None:
    """UserError where the search that is asked for has no axes."""
    if kind != "quick":
        raise UserError(f"--axis: the {kind} search is a grid of values; with ranges give --search quick")


def _range(text: str, limits: str, kind: click.ParamType) -> Range:
    """LOW:HIGH, each as a flag of the type `kind` would take it."""
    try:
        low, high = (kind.convert(part, None, None) for part in limits.split(":"))
    except ValueError:
        raise UserError(f"--axis {text}: LOW:HIGH is expected behind the =, like 0.8:1") from None
    except click.BadParameter as error:
        raise UserError(f"--axis {text}: {error.message.rstrip('.')}") from error
    if not all(type(end) in (int, float) and math.isfinite(end) for end in (low, high)):
        raise UserError(f"--axis {text}: only a setting that is a number can be searched")
    if not low < high:
        raise UserError(f"--axis {text}: the range must ascend, from {low:g} to more")
    return Range(low, high, whole=type(low) is int)
