"""`neon rows`, `neon reproduce`, `neon status`, `neon compare`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import torch

from neon_core.distributed import is_main, print0, session
from neon_core.seeds import format_seeds, parse_seeds
from neon_files.tracking import tracking
from neon_run import flags as f
from neon_run.backbones import backbone_of, find_row, find_rows
from neon_run.cli import check_writable
from neon_run.reproduce.compare import write_comparison
from neon_run.reproduce.ledger import status
from neon_run.reproduce.pages import settings_text
from neon_run.reproduce.reproduction import Plan, Reproduction
from neon_run.row import Row
from neon_run.search.axes import check_varied, chosen_axes
from neon_run.search.interval import MOST_RESAMPLES
from neon_run.stages import with_settings


@click.command("rows")
def rows_command() -> None:
    """What can be reproduced here: the rows of the paper's table, with the paper's FIDs, and a few beside it."""
    head = ("row", "base FID", "Neon FID", "w", "|S|", "fine-tune", "searched with w, from")
    lines = [head, *map(_cells, find_rows().values())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print0("  ".join(cells))


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (row.base_fid, row.neon_fid, row.w)
    return (
        row.id,
        *("-" if number is None else f"{number:g}" for number in numbers),
        f"{row.num_synthetic:,}",
        f"{row.train.images / 1e6:g} Mi",
        settings_text({name: row.evaluate[name] for name in row.axes}) or "-",
    )


@click.command("status")
@click.argument("out_dir", type=f.FOLDER)
def status_command(out_dir: Path) -> None:
    """The finished stages of the run in OUT_DIR, their cost, and the next stage."""
    print0(status(out_dir))


@click.command("compare")
@click.argument("runs", nargs=-1, type=f.FOLDER, metavar="RUN RUN...")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="compare.html", show_default=True,
              help="The page to write.")  # fmt: skip
def compare_command(runs: tuple[Path, ...], out: Path) -> None:
    """One page over several finished runs of `neon reproduce`: rows, seeds, settings."""
    for line in write_comparison(runs, out):
        print0(line)
    print0(str(out))


ROW_FLAGS = (  # -> the row
    f.flag("--num_synthetic", type=f.TWO_OR_MORE, help="|S|.  [default here and below: the row's]"),
    f.flag("--synthetic_from", "synthetic_seed", type=click.IntRange(0), help="The first seed of S."),
    f.flag("--images", type=f.COUNT, help="Length of the fine-tune, images."),
    f.flag("--seeds", callback=f.parse_seed_list, help="Of the evaluation, like 0-49999."),
    f.BATCH_SIZE,
    f.AXIS,
)
PLAN_FLAGS = (  # -> Plan
    f.flag("--base", metavar="PATH|URL", help="theta_base."),
    f.flag("--fid_stats", "--ref", "reference", metavar="PATH|URL", help="Reference statistics, .npz."),
    f.flag("--heldout_ref", "heldout", metavar="PATH|URL", help="A second reference, reported beside the first."),
    f.flag("--tokenizer", metavar="FILE", help="Frozen tokenizer, where the row has one."),
    f.DETECTOR,
    f.flag("--real_images", metavar="PATH", help="Real images: adds KID, precision, recall, density, coverage."),
    f.flag(
        "--search",
        type=click.Choice(["quick", "official"]),
        default="quick",
        help="Ours, or the official early-stopped grid, for comparison.",
    ),
    f.flag("--snapshots", type=f.COUNT, default=4, help="That the quick search visits."),
    f.flag("--ranking_images", type=f.TWO_OR_MORE, help="Per setting of the quick search.  [default: the search's]"),
    f.flag(
        "--deciding_images",
        type=f.TWO_OR_MORE,
        help="Of the best two, and of the controls.  [default: 10000, or all seeds]",
    ),
    f.flag("--second_block/--no_second_block", default=True, help="Evaluate base and Neon on other seeds too."),
    f.flag("--controls/--no_controls", default=True, help="Curve over w, self-trained and a random direction."),
    f.flag(
        "--curve",
        callback=f.parse_numbers,
        metavar="W,W,...",
        help="Also measured, for the plot.  [default: parts of the best w]",
    ),
    f.flag("--data", metavar="PATH", help="Real images, where the row trains its base on them here."),
    f.flag("--real_training", metavar="PATH", help="Training set: the control of more training on real data."),
    f.flag("--resamples", type=click.IntRange(2, MOST_RESAMPLES), default=30, help="Of the bootstrap."),
    f.flag("--seed", type=click.IntRange(0), default=0, help="Of the fine-tune, and of a base that is trained here."),
)
REPEAT = f.flag(
    "--repeat",
    type=f.COUNT,
    default=1,
    help="So many runs, OUT/seed-0 and so on, each with a seed of its own and images of its own, and one "
    "page over them, OUT/compare.html.",
)
REPEAT_STRIDE = 10_000_000  # between the seeds of images of two repetitions  # fmt: skip
OUT = f.flag("--out", "out_dir", type=f.FOLDER, required=True, help="Folder of the run; the same one continues it.")


def reproduce(row_name: str, out_dir: Path, device: str, log: str = "none", repeat: int = 1, **values: Any) -> None:
    """Take ROW (see `neon rows`) from its published files to its final FID: fetch, generate S, fine-tune, search,
    merge, evaluate, report. Stop it whenever you like; the same command goes on, on any number of processes."""
    row = changed(find_row(row_name), f.given(values, ROW_FLAGS))
    plan = Plan(**f.given(values, PLAN_FLAGS))
    if values.get("axes"):
        check_varied(plan.search)
    check_writable(out_dir, "--out")
    runs = [(row, out_dir, plan)]
    if repeat > 1:
        runs = [repetition(row, out_dir, plan, number) for number in range(repeat)]
    with session(device) as where, tracking(log, out_dir.with_name(f"{out_dir.name}.logs"), is_main()):
        for number, run in enumerate(runs):
            if repeat > 1:
                print0(f"run {number + 1} of {repeat}: {run[1]}")
            _reproduce(*run, where)
        if repeat > 1 and is_main():
            for line in write_comparison([folder for _, folder, _ in runs], out_dir / "compare.html"):
                print0(line)
            print0(str(out_dir / "compare.html"))


def _reproduce(row: Row, out_dir: Path, plan: Plan, device: torch.device) -> None:
    results = Reproduction(row, out_dir, plan, device, shlex.join(["neon", *sys.argv[1:]])).run()
    final, best = results["intervals"], results["best"]
    tuned = "".join(f" | {name}={value:g}" for name, value in best["settings"].items())
    ends = f"{row.distance} {final['base']['value']:.4f} -> {final['neon']['value']:.4f}"
    print0(f"{row.id} | {ends} | w={best['w']:g}{tuned} | {best['snapshot']} | {out_dir / 'report.html'}")


def repetition(row: Row, out_dir: Path, plan: Plan, number: int) -> tuple[Row, Path, Plan]:
    """Run `number` of several: the seed of its training, and the seeds of its images, are no other run's."""
    offset = number * REPEAT_STRIDE
    shifted = with_settings(
        row,
        synthetic_seed=row.synthetic_seed + offset,
        evaluate_seeds=format_seeds([seed + offset for seed in parse_seeds(row.evaluate_seeds)]),
    )
    return shifted, out_dir / f"seed-{plan.seed + number}", dataclasses.replace(plan, seed=plan.seed + number)


reproduce_command = click.Command(
    "reproduce",
    params=[
        click.Argument(["row_name"], metavar="ROW"),
        OUT,
        *PLAN_FLAGS[:6],
        *ROW_FLAGS,
        *PLAN_FLAGS[6:],
        REPEAT,
        f.DEVICE,
        f.LOG,
    ],
    callback=reproduce,
    help=reproduce.__doc__,
)


def changed(row: Row, given: dict[str, Any]) -> Row:
    """The row with the settings of the command line; a shorter fine-tune has the same snapshots up to its end."""
    plain = {name: given.get(name) for name in ("num_synthetic", "synthetic_seed", "batch_size")}
    if "images" in given:
        plain["train"] = dataclasses.replace(row.train, images=given["images"])
    if "seeds" in given:
        plain["evaluate_seeds"] = format_seeds(given["seeds"])
    if given.get("axes"):
        plain["axes"] = chosen_axes(row, given["axes"], backbone_of(row).sample)
    return with_settings(row, **plain)
