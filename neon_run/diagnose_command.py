"""`neon diagnose ROW|RUN`: of a folder of `neon reproduce`, or of a row with files of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from neon_core.distributed import agree, print0, session
from neon_core.selftrain import find_snapshots
from neon_files.errors import UserError
from neon_run import flags as f
from neon_run import stages
from neon_run.backbones import BackboneCommands, backbone_of, find_row
from neon_run.cli import write_result
from neon_run.commands import HELP, base_flag, find_model
from neon_run.diagnose import Amount, diagnose, summary
from neon_run.reproduce.ledger import Ledger
from neon_run.row import Row

AMOUNT = (
    f.flag("--num_images", "--N", "num_images", type=f.TWO_OR_MORE, default=2048, help="Of each kind, at most."),
    f.flag("--micro_batch_size", type=f.COUNT, help="Images per forward pass.  [default: the row's, or half a set]"),
    f.flag("--draws", type=f.COUNT, default=1, help="Of the loss's randomness, for each image: less noise, more time."),
    f.flag("--seed", type=click.IntRange(0), default=0, help="Of the choice of images and of the loss."),
    f.flag("--neutral/--no_neutral", default=True, help="Also draw images without guidance and filters."),
)  # fmt: skip
REAL = f.flag("--real", type=f.PATH, help="Real images, folder or .zip, with labels where the network has classes.")
OUTPUT = (*AMOUNT, f.DEVICE, f.JSON)


def is_run(name: str) -> bool:
    """Whether it names a folder of `neon reproduce`. UserError where it can be a row, too."""
    if not (Path(name) / "run.json").is_file():
        return False
    try:
        row = find_row(name)
    except UserError:
        return True
    raise UserError(f"{name}: is the row {row.id} and a folder here too; write ./{name} for the folder")


def model_of_run(out_dir: Path, row: Row, device: torch.device) -> tuple[stages.Model, dict[str, Path]]:
    """(theta_base, files) of a run: "data", and where it has them "real" and "snapshot", the last of its fine-tune.
    UserError where it has not drawn S."""
    ledger = Ledger(out_dir)
    records = agree(out_dir, lambda: [ledger.record(stage) for stage in ("fetch", "generate")])
    record = records[0]
    if record is None or None in records:
        raise UserError(f"{out_dir}: has not drawn S yet; go on with its command, which `neon status {out_dir}` shows")
    files = {name: out_dir / entry["path"] for name, entry in record["outputs"].items()}
    frozen = {n: files.get(n, path) for n, path in row.backbone.frozen_files(files["base"], **row.load).items()}
    found = {"data": out_dir / "synthetic"} | ({"real": files["real_training"]} if "real_training" in files else {})
    if agree(out_dir, lambda: ledger.record("finetune")) is not None:
        snapshots = find_snapshots(out_dir / "finetune")
        found["snapshot"] = snapshots[max(snapshots)]
    return stages.Model(row, files["base"], device, frozen), found


def row_of_run(out_dir: Path) -> Row:
    """Raises UserError."""
    try:
        return find_row(json.loads((out_dir / "run.json").read_text(encoding="utf-8"))["row"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out_dir / 'run.json'}: names no row; is {out_dir} a folder of neon reproduce?") from error


def finish(model: stages.Model, files: Mapping[str, Path], values: Mapping[str, Any]) -> None:
    """The diagnosis, its warnings, its line and its file; --data and --real come before those in `files`."""
    files = {**files, **{name: values[name] for name in ("data", "real") if values[name] is not None}}
    if "real" not in files:
        raise UserError("--real is missing: name real images, a folder or .zip like those that the base was trained on")
    amount = Amount(**{name: values[name] for name in ("num_images", "micro_batch_size", "draws", "seed", "neutral")})
    record = diagnose(model, **files, amount=amount, neutral=backbone_of(model.row).unbiased)
    for warning in record["warnings"]:
        print0(f"warning: {warning}")
    write_result(record, summary(record), values["json_path"])


def _run_command(out_dir: Path) -> click.Command:
    def callback(**values: Any) -> None:
        with session(values["device"]) as device:
            finish(*model_of_run(out_dir, row_of_run(out_dir), device), values)

    data = f.flag("--data", type=f.PATH, help="Another S.  [default: the run's]")
    return click.Command("diagnose", params=[data, REAL, *OUTPUT], callback=callback, context_settings=HELP)


def _row_command(row: Row, commands: BackboneCommands) -> click.Command:
    def callback(**values: Any) -> None:
        if not (values["checkpoint"] or row.base):
            raise UserError(f"{row.id}: makes its own base; name that as --base, or a folder of neon reproduce")
        with session(values["device"]) as device:
            model, _ = find_model(commands, row, values, device)
            finish(model, {}, values)

    loading = (base_flag(commands), f.ENTRY, *commands.load, *commands.load_training)
    params: list[click.Parameter] = [*loading, f.DATA, REAL, *OUTPUT]
    return click.Command("diagnose", params=params, callback=callback, context_settings=HELP)


@click.command("diagnose", context_settings={"allow_interspersed_args": False})
@click.argument("row", metavar="ROW|RUN")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[FLAGS]...")
def diagnose_command(row: str, words: Sequence[str]) -> None:
    """What is known before a search: the gradients of the loss at theta_base on real images and on S, their cosine, the
    noise floor, and the drift of the tokenizer. Of RUN, a folder of neon reproduce, or of ROW with --base, --data (S)
    and --real. It predicts the loss, not the distance. `neon diagnose ROW --help` lists the flags."""
    if is_run(row):
        command = _run_command(Path(row))
    else:
        command = _row_command(find_row(row), backbone_of(find_row(row)))
    command.main(list(words), prog_name=f"neon diagnose {row}", standalone_mode=False)
