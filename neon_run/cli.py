"""Running a command, its result line and its result file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from neon_core.distributed import is_main, print0
from neon_files.atomic import atomic_path
from neon_files.errors import UserError


def run(command: click.Command, words: Sequence[str] | None = None) -> None:
    """Run a script's command on `words`, by default this process's arguments; an error that the user can fix is one
    line, printed once for all ranks."""
    try:
        code = command.main(words, standalone_mode=False)
    except click.ClickException as error:
        if os.environ.get("RANK", "0") == "0":  # the command line is the same on every rank
            error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def measured_line(result: Mapping[str, Any], settings: Sequence[str], digits: int = 4) -> str:
    """`FID=1.7800 | IS=300.5000±2.2500 | <settings>` as the official scripts print it, then further metrics, and the
    detector where it is not the official one."""
    parts = [f"FID={result['fid']:.{digits}f}"] if "fid" in result else []
    if "is_mean" in result:
        parts.append(f"IS={result['is_mean']:.{digits}f}±{result['is_std']:.{digits}f}")
    parts += settings
    more = ("kid_mean", "precision", "recall", "density", "coverage")
    parts += [f"{name.removesuffix('_mean').upper()}={result[name]:.{digits}f}" for name in more if name in result]
    return " | ".join(parts if result["detector_is_official"] else [*parts, f"detector={result['detector']}"])


def keep_result(result: dict, json_path: Path | None) -> None:
    """The whole result in `json_path`. Rank 0 only."""
    if json_path is not None and is_main():
        with atomic_path(json_path) as temporary:
            text = json.dumps(result, indent=1, sort_keys=True, default=str) + "\n"
            temporary.write_text(text, encoding="utf-8")


def write_result(result: dict, line: str, json_path: Path | None) -> None:
    """`keep_result`, then one result line on stdout. Rank 0 only. A terminal that lacks a letter of the line gets a
    question mark in its place."""
    keep_result(result, json_path)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print0(line.encode(encoding, "replace").decode(encoding))


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder`; UserError naming `flag` where that or writing in it fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there ({error.strerror}); name another folder") from error
