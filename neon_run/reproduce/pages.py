"""HTML pages from the templates beside this file, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from neon_run.reproduce.glossary import explained


def fid_text(value: float) -> str:
    """Four decimals, as papers report FIDs; three digits where four decimals would show none."""
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def settings_text(settings: Mapping[str, float]) -> str:
    """ "cfg 2.7, top_p 0.9"."""
    return ", ".join(f"{name} {short(value)}" for name, value in settings.items())


def margin(interval: Mapping[str, float]) -> str:
    """Half the width of a 95 % interval."""
    return fid_text(1.96 * interval["standard_error"])


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"fid": fid_text, "short": short, "margin": margin}
ENVIRONMENT.globals["explained"] = explained


def page(template: str, view: Mapping[str, Any]) -> str:
    """The page `template` of what `view` holds; text is escaped, `markupsafe.Markup` is not."""
    return ENVIRONMENT.get_template(template).render(view)
