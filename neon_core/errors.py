"""The error a user can mend."""

import click


class UserError(click.ClickException):
    """One clear sentence that names the offending file, flag or key and the remedy. Exit code 2, no traceback."""

    exit_code = 2
