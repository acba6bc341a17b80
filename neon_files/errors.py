"""The error a user can mend, and notes to the user."""

import os
import sys

import click


class UserError(click.ClickException):
    """One clear sentence that names the offending file, flag or key and the remedy. Exit code 2, no traceback."""

    exit_code = 2


def say(text: str) -> None:
    """A note on stderr, once for all ranks of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
