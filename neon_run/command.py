"""The `neon` command."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

from neon_files.downloads import main as download_command
from neon_run.backbones import backbone_of, find_row, find_rows
from neon_run.check.command import check_command
from neon_run.cli import run
from neon_run.commands import STAGES, command, run_words
from neon_run.diagnose_command import diagnose_command
from neon_run.image_commands import are_images, measure_command, reference_command
from neon_run.merging.command import merge_command
from neon_run.merging.push import push_command
from neon_run.pipelines.command import improve_command
from neon_run.reproduce.commands import compare_command, reproduce_command, rows_command, status_command

DISTRIBUTION = "neon-reference"


def installed_version() -> str:
    """Of the installed package; of a checkout that is not installed, "checkout"."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "checkout"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(installed_version(), "--version", prog_name="neon")
def neon() -> None:
    """Neon: Negative Extrapolation from Self-Training (arXiv 2510.03597)."""


def complete_row(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of rows, for the shell."""
    return [row for row in find_rows() if row.startswith(incomplete)]


def stage_command(stage: str, name: str) -> click.Command:
    """`neon NAME ROW FLAGS`: the script of that stage, of the row's backbone, with the row as its --preset."""

    def callback(row: str, words: tuple[str, ...]) -> None:
        if stage == "calculate_fid" and are_images(row):
            measure_command.main([row, *words], prog_name=f"neon {name}", standalone_mode=False)
            return
        chosen = find_row(row)
        backbone = backbone_of(chosen)
        run_words(command(stage, backbone, chosen.id), backbone, stage, words, f"neon {name} {row}")

    images = " IMAGES: the same of a folder or .zip, with --ref." if stage == "calculate_fid" else ""
    return click.Command(
        name,
        params=[
            click.Argument(
                ["row"], metavar="ROW|IMAGES" if stage == "calculate_fid" else "ROW", shell_complete=complete_row
            ),
            click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="[FLAGS]..."),
        ],
        callback=callback,
        help=f"{STAGES[stage][2]}{images} `neon rows` lists the rows, `neon {name} ROW --help` the flags.",
        context_settings={"allow_interspersed_args": False},  # words after ROW are the script's, --help too
    )


for stage, name in (("generate", "generate"), ("finetune", "finetune"), ("sweep", "sweep"), ("calculate_fid", "fid")):
    neon.add_command(stage_command(stage, name))
for other in (rows_command, reproduce_command, status_command, compare_command, merge_command, push_command):
    neon.add_command(other)
for other in (improve_command, reference_command, diagnose_command, check_command):
    neon.add_command(other)
neon.add_command(download_command, "download")


def main() -> None:
    """The command on this process's arguments; entry points call it through `neon_run.__main__`."""
    run(neon)
