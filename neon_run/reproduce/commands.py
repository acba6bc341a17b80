"""`neon rows`, `neon reproduce`, `neon status`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

import click

from neon_core.backbone import Recipe
from neon_core.distributed import print0, session
from neon_core.seeds import format_seeds
from neon_files.errors import UserError
from neon_run import cli
from neon_run.reproduce.ledger import status
from neon_run.reproduce.reproduction import Plan, Reproduction
from neon_run.rows import Row, find_row, find_rows

COUNT = click.IntRange(2)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("rows")
def rows_command() -> None:
    """What can be reproduced here: the rows of the paper's table, with the paper's FIDs, and a few beside it."""
    head = ("row", "base FID", "Neon FID", "w", "|S|", "fine-tune", "guidance")
    lines = [head, *map(_cells, find_rows().values())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print0("  ".join(cells))


def _cells(row: Row) -> tuple[str, ...]:
    recipe = row.recipe
    guidance = recipe.evaluate.get(row.guidance) if row.guidance else None
    numbers = (row.base_fid, row.neon_fid, recipe.w)
    return (
        row.id,
        *("-" if number is None else f"{number:g}" for number in numbers),
        f"{recipe.num_synthetic:,}",
        f"{recipe.train.images / 1e6:g} Mi",
        "-" if guidance is None else f"{row.guidance} {guidance:g}",
    )


@click.command("status")
@click.argument("out_dir", type=FOLDER)
def status_command(out_dir: Path) -> None:
    """What is done of the run in OUT_DIR, what it cost, and what is next."""
    print0(status(out_dir))


@click.command("reproduce")
@click.argument("row_name", metavar="ROW")
@click.option("--out", "out_dir", type=FOLDER, required=True, help="Folder of the run; the same one continues it.")
@click.option("--base", metavar="PATH|URL", help="theta_base.  [default here and below: the row's]")
@click.option("--fid_stats", "--ref", "reference", metavar="PATH|URL", help="Reference statistics, .npz.")
@click.option("--heldout_ref", "heldout", metavar="PATH|URL", help="A second reference, reported beside the first.")
@click.option("--tokenizer", metavar="FILE", help="Frozen tokenizer, where the row has one.")
@click.option("--detector", metavar="FILE", help="Inception weights.")
@click.option("--real_images", metavar="PATH", help="Real images: adds KID, precision, recall, density, coverage.")
@click.option("--num_synthetic", type=COUNT, help="|S|.")
@click.option("--synthetic_from", type=click.IntRange(0), default=0, show_default=True, help="The first seed of S.")
@click.option("--images", type=click.IntRange(1), help="Length of the fine-tune, images.")
@click.option("--seeds", callback=cli.parse_seed_list, help="Of the evaluation, like 0-49999.")
@click.option("--search", type=click.Choice(["quick", "official"]), default="quick", show_default=True,
              help="Ours, or the official early-stopped grid, for comparison.")  # fmt: skip
@click.option("--snapshots", type=click.IntRange(1), default=4, show_default=True, help="That the quick search visits.")
@click.option("--ranking_images", type=COUNT, help="Per setting of the quick search.  [default: the search's]")
@click.option("--deciding_images", type=COUNT,
              help="Of the best two, and of the controls.  [default: 10000, or all seeds]")  # fmt: skip
@click.option("--second_block/--no_second_block", default=True, show_default=True,
              help="Evaluate base and Neon on other seeds too.")  # fmt: skip
@click.option("--controls/--no_controls", default=True, show_default=True,
              help="Curve over w, self-trained and a random direction.")  # fmt: skip
@click.option("--curve", callback=cli.parse_numbers, metavar="W,W,...",
              help="Also measured, for the plot.  [default: parts of the best w]")  # fmt: skip
@click.option("--real_training", metavar="PATH", help="Training set: adds the control of more training on real data.")
@click.option("--resamples", type=COUNT, default=30, show_default=True, help="Of the bootstrap.")
@cli.batch_option
@cli.seed_option
@cli.device_option
def reproduce_command(row_name: str, out_dir: Path, num_synthetic, images, seeds, device: str, **given) -> None:
    """Take ROW (see `neon rows`) from its published files to its final FID: fetch, generate S, fine-tune, search,
    merge, evaluate, report. Stop it whenever you like; the same command goes on, on any number of processes."""
    row = find_row(row_name)
    row = dataclasses.replace(row, recipe=changed(row.recipe, num_synthetic, images, seeds))
    if given["tokenizer"] and not row.tokenizer:
        raise UserError(f"--tokenizer: {row.id} has none; leave it out")
    cli.check_writable(out_dir, "--out")
    with session(device) as where:
        run = Reproduction(row, out_dir, Plan(**given), where, shlex.join(["neon", *sys.argv[1:]]))
        results = run.run()
        final, best = results["intervals"], results["best"]
        guided = "" if best["guidance"] is None else f" | {row.guidance}={best['guidance']:g}"
        print0(
            f"{row.id} | FID {final['base']['value']:.4f} -> {final['neon']['value']:.4f} | w={best['w']:g}{guided} | "
            f"{best['snapshot']} | {out_dir / 'report.html'}"
        )


def changed(recipe: Recipe, num_synthetic: int | None, images: int | None, seeds: list[int] | None) -> Recipe:
    """The recipe with what is not None; a shorter fine-tune keeps its snapshots as far as it goes."""
    changes: dict = {}
    if num_synthetic is not None:
        changes["num_synthetic"] = num_synthetic
    if images is not None:
        changes["train"] = dataclasses.replace(recipe.train, images=images)
    if seeds is not None:
        changes["evaluate_seeds"] = format_seeds(seeds)
    return dataclasses.replace(recipe, **changes)
