"""Labels in file names, `000123_label7.png`, read as the official make_labels.py does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import click

from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.image_store import is_clutter
from neon_run.cli import run

LABELLED = re.compile(r".+_label(\d+)\.(png|jpg|jpeg)", re.IGNORECASE | re.DOTALL)


def labels_of_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """(name, label) of every relative path whose file is named `<prefix>_label<digits>.png` (or jpg, jpeg), sorted
    by the whole path. The last `_label` of a name counts; others are left out."""
    matches = ((name, LABELLED.fullmatch(name.rpartition("/")[2])) for name in names)
    return sorted((name, int(match[1])) for name, match in matches if match)


def make_labels(root: str | Path) -> tuple[Path, int]:
    """Write `root`/dataset.json for the labelled images below `root`. Returns its path and the number of entries.

    Raises UserError where there is none: training on such a set would only fail later.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    names = [Path(folder, file).relative_to(root).as_posix() for folder, _, files in os.walk(root) for file in files]
    entries = labels_of_names(name for name in names if not is_clutter(name))
    if not entries:
        raise UserError(f"--root {root}: no file is named like 000123_label7.png; make the set with edm/generate.py")
    path = root / "dataset.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"labels": entries}, indent=2), encoding="utf-8")
    return path, len(entries)


@click.command()
@click.option("--root", "-r", required=True, type=click.Path(path_type=Path), help="Folder of labelled images.")
def main(root: Path) -> None:
    """Write dataset.json from file names: python -m neon_edm.data --root DIR. (Our generate.py writes it by itself.)"""
    path, count = make_labels(root)
    click.echo(f"Wrote {count} entries to {path}")


if __name__ == "__main__":
    run(main)
