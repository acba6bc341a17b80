"""`neon check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from neon_core.distributed import gather_objects, print0, session
from neon_files.errors import UserError
from neon_run import flags as f
from neon_run.backbones import backbone_of, find_row, find_rows
from neon_run.check import golden, machine
from neon_run.check.speed import Effort, measure
from neon_run.cli import keep_result, write_result

GIB = 2**30
CPU_EFFORT = Effort(seconds=4.0, weight_bytes=GIB // 2)  # for a row that is not named
COLUMNS = {"row": 20, "batch": 5, "images/s": 9, "compiled": 9, "launches": 9, "GiB": 7, "training": 9, "S, h": 8,
           "fine-tune": 9, "FID, h": 8}  # fmt: skip


def check(rows: tuple[str, ...], compiled: bool, batch_size: int | None, device: str, json_path: Path | None) -> None:
    """What this machine is, whether it computes what others do, and how long each row will take on it.

    First numbers of tiny networks against recorded ones, and a sum over all ranks (torchrun). Then every row, or those
    named, with random weights: nothing is downloaded. On a CPU, rows that take long are left out unless they are named.
    """
    chosen = [find_row(name) for name in rows] or list(find_rows().values())
    with session(device) as where:
        report = check_machine(where)
        effort = CPU_EFFORT if where.type == "cpu" and not rows else Effort()
        if effort is CPU_EFFORT:
            print0(f"rows        on a CPU those with up to 512 MiB of weights and {effort.seconds:g} s for the first "
                   "image; name a row to measure it whatever it takes")  # fmt: skip
        effort = Effort(batch_size, compiled, effort.seconds, effort.weight_bytes)
        print0("\n" + _line(list(COLUMNS)))
        report["rows"] = []
        for row in chosen:
            parts = backbone_of(row).machine_check
            skipped = {"row": row.id, "skipped": "its backbone brings nothing to `neon check`"}
            report["rows"].append(skipped if parts is None else measure(row, parts, where, effort))
            keep_result(report, json_path)  # a check that is stopped has kept what it measured
            print0(_line(cells(report["rows"][-1])))
            if reason := report["rows"][-1].get("compiled", {}).get("error"):
                print0(f"  not compiled: {reason}")
        worst, difference = max(report["golden"].items(), key=lambda item: item[1])
        wrong = difference > golden.LIMIT
        done = sum("skipped" not in row for row in report["rows"])
        numbers = f"numbers {'NOT ' if wrong else ''}as recorded ({difference:.1e})"
        where_from = f"{report['facts'][0]['name']}, {len(report['facts'])} rank(s)"
        line = f"\n{numbers} | {done} of {len(chosen)} rows measured | {where_from}"
        write_result(report, line, json_path)
        if wrong:
            raise UserError(
                f"{worst}: differs from the recorded numbers by {difference:.1e} of the largest, more than "
                f"{golden.LIMIT:g}; update driver or torch, or use another device, before trusting its results"
            )


def check_machine(where: torch.device) -> dict[str, Any]:
    """{"facts" of every rank, "products", "golden", "ranks"}, printed as they come."""
    facts = gather_objects(machine.facts(where))
    print0(f"device      {describe(facts[0])}")
    print0(f"software    torch {facts[0]['torch']}, Python {facts[0]['python']}, {facts[0]['system']}")
    print0(f"seeds       {facts[0]['draws']}: images of a seed are equal only where this is equal")
    speeds = machine.products(where)
    kinds = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name}: {value}" for name, value in speeds.items()
    ]
    print0(f"products    {', '.join(kinds)} TFLOP/s{'' if where.type == 'cuda' else '; TF32 is for GPUs'}")
    every = gather_objects(golden.differences(where))
    largest = {name: max(of_rank[name] for of_rank in every) for name in every[0]}
    print0(f"numbers     of tiny networks in float32: {len(largest)} outputs, largest difference to the recorded "
           f"{max(largest.values()):.1e} of the largest value (limit {golden.LIMIT:g})")  # fmt: skip
    ranks = machine.collective(where)
    text = "1; start with torchrun to check more"
    if "seconds" in ranks:
        text = f"{ranks['ranks']}; a sum of {ranks['bytes'] / 2**20:g} MiB is right and takes {ranks['seconds']:.2g} s"
    print0(f"ranks       {text}")
    return {"facts": facts, "products": speeds, "golden": largest, "ranks": ranks}


def describe(facts: Mapping[str, Any]) -> str:
    """The device in words."""
    if "capability" not in facts:
        return f"{facts['name']} ({facts['device']}), {facts['vectors']}, threads: {facts['threads']}"
    return (
        f"{facts['name']} ({facts['device']}), {facts['memory_bytes'] / GIB:.0f} GiB, "
        f"capability {facts['capability']}, driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}, "
        f"cuDNN {facts['cudnn']}, bf16: {'yes' if facts['bf16'] else 'no'}, TF32: {'yes' if facts['tf32'] else 'no'}"
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """Of the table, in the order of COLUMNS."""
    if "skipped" in row:
        return [row["row"], row["skipped"]]
    compiled = row.get("compiled", {})
    return [
        row["row"],
        str(row["batch_size"]),
        _number(row["images_per_second"]),
        "failed" if "error" in compiled else _number(compiled.get("images_per_second")),
        f"{row['launches']:,}",
        f"{row['peak_bytes'] / GIB:.2f}",
        _number(row["training"].get("images_per_second")),
        *(_number(row["hours"][name]) for name in ("generate", "finetune", "evaluate")),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(texts: list[str]) -> str:
    (first, wide), *others = zip(texts, COLUMNS.values(), strict=False)
    if len(texts) == 2:
        return f"{first:<{wide}}  {texts[1]}"
    return " ".join([f"{first:<{wide}}", *(f"{text:>{width}}" for text, width in others)])


check_command = click.Command(
    "check",
    params=[
        click.Argument(["rows"], nargs=-1, metavar="[ROW]..."),
        f.flag("--compile/--no_compile", "compiled", default=False, help="Also with torch.compile: minutes a row."),
        f.BATCH_SIZE,
        f.DEVICE,
        f.flag("--out", "--json", "json_path", type=f.FILE, help="Also write everything as JSON."),
    ],
    callback=check,
    help=check.__doc__,
    context_settings={"help_option_names": ["-h", "--help"]},
)
