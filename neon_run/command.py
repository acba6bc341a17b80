"""The `neon` command."""

from __future__ import annotations

import click

from neon_files.downloads import main as download_command
from neon_run.cli import run
from neon_run.merging.command import merge_command
from neon_run.merging.push import push_command
from neon_run.reproduce.commands import reproduce_command, rows_command, status_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def neon() -> None:
    """Neon: Negative Extrapolation from Self-Training (arXiv 2510.03597)."""


for command in (rows_command, reproduce_command, status_command, merge_command, push_command):
    neon.add_command(command)
neon.add_command(download_command, "download")


def main() -> None:
    """Entry point of `neon`, `python -m neon_run` and `python -m neon_core`."""
    run(neon)
