"""`neon merge`: two files, folders or adapters -> the merged one.

neon merge base.pth synthetic.safetensors -w 1.5 -o neon.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from neon_files.checkpoint import find_checkpoint
from neon_files.containers import open_weights
from neon_files.distributed_checkpoint import is_distributed
from neon_files.errors import UserError
from neon_run.cli import run
from neon_run.merging import folders
from neon_run.merging.adapters import looks_like_adapter
from neon_run.merging.files import merge_files
from neon_run.merging.rules import NEON
from neon_run.merging.steps import Steps, as_steps
from neon_run.merging.weight_file import WeightFile


def merge_paths(
    base: Path,
    syn: Path,
    w: float | Steps,
    out: Path,
    rule: str = NEON,
    entries: Sequence[str | None] = (None, None),
    scale: float | None = None,
    dense: bool = False,
) -> None:
    """`merge_files`, or its counterpart for two folders or two adapters."""
    steps = as_steps(w)
    if any(path.is_dir() and not is_distributed(path) for path in (base, syn)):
        _refuse(rule != NEON, f"--rule {rule}")
        _refuse(any(entries), "--entry")
        folders.merge_folders(base, syn, steps, out, scale, dense)
        return
    ends = tuple(zip((find_checkpoint(base), find_checkpoint(syn)), entries, strict=True))
    if not dense and any(looks_like_adapter(path, open_weights(path, entry).loaders) for path, entry in ends):
        _refuse(rule != NEON, f"--rule {rule}")
        ours, theirs = (WeightFile(path, entry) for path, entry in ends)
        folders.merge_adapter_files(ours, theirs, steps, out, scale)
        return
    if scale is not None:
        raise UserError("--scale: applies to LoRA adapters, these are networks")
    merge_files(base, syn, steps, out, rule, entries, dense)


def _refuse(given: bool, flag: str) -> None:
    if given:
        raise UserError(f"{flag}: only for two checkpoint files, not for folders and LoRA adapters")


def read_steps(given: Sequence[str], keep: Sequence[str]) -> Steps:
    """The steps of `-w 1.0 --w 'up_blocks.*=0.5' --keep 'norm*'`. Raises UserError."""
    numbers = [text for text in given if "=" not in text]
    if len(numbers) != 1:
        raise UserError(f"-w: give one number for all tensors, beside any PATTERN=W; there are {len(numbers)}")
    blocks = [text.rpartition("=")[::2] for text in given if "=" in text]
    return Steps(_number(numbers[0]), tuple((pattern, _number(w)) for pattern, w in blocks), tuple(keep))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"-w {text}: is no number") from error


def read_entries(given: Sequence[str]) -> tuple[str | None, str | None]:
    """(BASE's, SYN's) entry. Raises UserError."""
    if len(given) > 2:
        raise UserError("--entry: once for both files, or twice: BASE's, then SYN's")
    base, syn = (*given, *given)[:2] if given else ("", "")
    return base or None, syn or None


@dataclass(frozen=True)
class Choices:
    """The flags of `neon merge` that select the kind of merge."""

    w: Sequence[str]
    keep: Sequence[str]
    entry: Sequence[str]
    scale: float | None
    dense: bool
    rule: str


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path), required=False)
@click.argument("syn", type=click.Path(path_type=Path), required=False)
@click.option(
    "--lora",
    type=click.Path(path_type=Path),
    help="Instead of BASE and SYN: a LoRA adapter trained on synthetic data, file or folder; reversed.",
)
@click.option(
    "-w",
    "--w",
    "w",
    multiple=True,
    required=True,
    metavar="W | PATTERN=W",
    help="Merge weight; 0 gives BASE, -1 gives SYN, the paper's rows use w > 0. Again with a pattern for tensors with "
    "another w, like 'up_blocks.*=0.5'; the last match counts.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write, .safetensors or .pt; folder for folders.",
)
@click.option(
    "--keep",
    "--exclude",
    "keep",
    multiple=True,
    metavar="PATTERN",
    help="Tensors that come from BASE, besides running statistics; like '*norm*'. May be given again.",
)
@click.option(
    "--entry",
    multiple=True,
    metavar="NAME",
    help="State dict to take where a file holds several; once for both files, or BASE's, then SYN's ('': as usual).",
)
@click.option("--scale", type=float, help="alpha / r of LoRA adapters whose files do not state it.")
@click.option("--dense", is_flag=True, help="Names that look like an adapter's are ordinary weights of a network.")
@click.option(
    "--rule",
    default=NEON,
    show_default=True,
    help="neon, or official-NAME: the merge of that backbone's official script.",
)
def merge_command(base: Path | None, syn: Path | None, lora: Path | None, out: Path, **choices: Any) -> None:
    """BASE and SYN, checkpoints of one network -> base - w (syn - base).

    Files in any published container; folders (diffusers pipelines, sharded checkpoints): every weight file is merged,
    everything else copied; LoRA adapters: the products up @ down are merged.
    """
    given = Choices(**choices)
    steps = read_steps(given.w, given.keep)
    steps_text = " | ".join([f"w={steps.w:g}", *(f"{pattern}={w:g}" for pattern, w in steps.blocks)])
    if lora is not None:
        if base is not None or given.rule != NEON or given.entry or given.dense or given.scale is not None:
            raise UserError("--lora: takes the place of BASE and SYN, without --rule, --entry, --scale, --dense")
        folders.reverse_adapter(lora, steps, out)
        click.echo(f"{out} | {steps_text} | lora={lora.name}")
        return
    if base is None or syn is None:
        raise click.UsageError("BASE and SYN are needed, two files or two folders; or --lora ADAPTER")
    merge_paths(base, syn, steps, out, given.rule, read_entries(given.entry), given.scale, given.dense)
    click.echo(f"{out} | {steps_text} | rule={given.rule} | base={base.name} | syn={syn.name}")


if __name__ == "__main__":
    run(merge_command)
