"""The error that a user can fix, and notes to the user."""

import os
import sys
from collections.abc import Sequence

import click


class UserError(click.ClickException):
    """One clear sentence that names the offending file, flag or key and the remedy. Exit code 2, no traceback."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """The first line with letters of an error's text, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def and_more(names: Sequence[str]) -> str:
    """ " and 3 more" behind the first of `names`; "" where it is the only one."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def say(text: str) -> None:
    """A note on stderr, once for all ranks of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
