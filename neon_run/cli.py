"""What every command line shares."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from neon_core.distributed import is_main, print0
from neon_core.seeds import parse_seeds
from neon_files.atomic import atomic_path
from neon_files.errors import UserError

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda; each local rank takes its own GPU."
)
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the result and every setting.",
)
seed_option = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the fine-tune.")


def batch_size_option(default: int | None, note: str = "") -> Callable:
    """--batch_size; `note` says what a default of None means."""
    return click.option(
        "--batch_size",
        "--max_batch_size",
        "--batch",
        "batch_size",
        type=click.IntRange(1),
        default=default,
        show_default=default is not None,
        help="Images sampled at once by one process." + note,
    )


batch_option = batch_size_option(64)


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator, in the order in which --help shows them."""

    def apply(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.replace(" ", "").split(",")))


def metric_options(metrics: str, reference: str | None = None) -> Callable:
    """Which metrics, against what: `reference`, `metrics`, `real_images`, `detector` of `evaluate.Evaluator`.

    `reference` None: it must be given; "": the row's, which the script fills in.
    """
    return options(
        click.option(
            "--fid_stats",
            "--ref",
            "reference",
            default=reference,
            show_default="the row's" if reference == "" else True,
            required=reference is None,
            metavar="PATH|URL",
            help="Reference statistics, .npz.",
        ),
        click.option(
            "--metrics",
            default=metrics,
            show_default=True,
            callback=_names,
            help="Of fid, is, kid, prdc; the last two need --real_images.",
        ),
        click.option("--real_images", metavar="PATH", help="Real images, folder or .zip, for kid and prdc."),
        click.option("--detector", metavar="FILE", help="Inception weights.  [default: as download_models.sh fetches]"),
    )


def parse_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    """Callback of a flag that takes a list of numbers like 0,0.25,0.5; repeats are dropped."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{parameter.opts[0]} {text}: not a list of numbers like 0,0.25,0.5") from error
    for number in numbers:
        if not math.isfinite(number):
            raise UserError(f"{parameter.opts[0]} {text}: {number} is not a finite number")
    return list(dict.fromkeys(numbers))


def parse_seed_list(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Callback of a flag that takes a seed list like 0-49999; at least one seed."""
    if text is None:
        return None
    seeds = parse_seeds(text)
    if not seeds:
        raise UserError(f"{parameter.opts[0]} {text}: names no seed; a range runs upwards, like 0-49999")
    return seeds


work_options = options(
    click.option(
        "--work_dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Keep partial sums there, to go on after a kill.",
    ),
    click.option(
        "--save_images", type=click.Path(file_okay=False, path_type=Path), help="Also write the images as PNG."
    ),
)


def run(command: click.Command) -> None:
    """Run a script's command; an error that the user can mend is one line, printed once for all ranks."""
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as error:
        if os.environ.get("RANK", "0") == "0":  # the command line is the same on every rank
            error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def measured_line(result: dict, settings: Sequence[str], digits: int = 4) -> str:
    """`FID=1.7800 | IS=300.5000±2.2500 | <settings>` as the official scripts print it, and behind it what else was
    measured, and the detector where it is not the official one."""
    parts = [f"FID={result['fid']:.{digits}f}"] if "fid" in result else []
    if "is_mean" in result:
        parts.append(f"IS={result['is_mean']:.{digits}f}±{result['is_std']:.{digits}f}")
    parts += settings
    more = ("kid_mean", "precision", "recall", "density", "coverage")
    parts += [f"{name.removesuffix('_mean').upper()}={result[name]:.{digits}f}" for name in more if name in result]
    return " | ".join(parts if result["detector_is_official"] else [*parts, f"detector={result['detector']}"])


def write_result(result: dict, line: str, json_path: Path | None) -> None:
    """One result line on stdout, and the whole result beside it. Rank 0 only."""
    print0(line)
    if json_path is not None and is_main():
        with atomic_path(json_path) as temporary:
            temporary.write_text(json.dumps(result, indent=1, sort_keys=True, default=str) + "\n")


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder`; UserError naming `flag` where that or writing in it fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there ({error.strerror}); name another folder") from error
