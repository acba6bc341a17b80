"""The folder of a run: its finished stages, their settings and their cost.

<out>/run.json              the row and its stages, for `neon status`
<out>/stages/<stage>.json   written last: a stage that has it is done, as long as its key is the same
<out>/stages/.<stage>.clock seconds so far of a stage that was stopped
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from neon_core.distributed import barrier, broadcast_object, is_main, print0, world_size
from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.run_files import (
    NUMBER,
    DamagedFile,
    identity,
    intact,
    one_run,
    read_record,
    set_aside,
    unchanged,
    write_record,
)

RECORD = {"stage": str, "key": str, "settings": dict, "outputs": dict, "files": list, "cost": dict}
CLOCK = {"key": str, "seconds": NUMBER, "starts": int}
STAGES = ("fetch", "generate", "finetune", "search", "merge", "evaluate", "report")
# Of a run's folder; sets, fine-tunes and sweeps, which scripts may have begun, are claimed by their own records.
WRITTEN = ("neon.safetensors", "results.json", "report.html", "samples", "controls", "prepared", "stages")
TICK = 5.0  # seconds between two entries of the clock


def digest(value: Any) -> str:
    """16 hex digits of the JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """Runs stages at most once. Every rank makes the same calls; rank 0 alone reads and writes the records."""

    def __init__(self, out_dir: str | Path, on_stage: Callable[[str], None] = lambda stage: None):
        self.out_dir, self.on_stage = Path(out_dir), on_stage
        self.keys: dict[str, str] = {}
        self.about: dict[str, Any] = {}

    @contextmanager
    def running(self, row: str, command: str) -> Iterator[None]:
        """The body is the only run in the folder, whose run.json names the row and the command that continues it.
        Raises UserError."""
        with one_run(self.out_dir) if is_main() else nullcontext():
            if is_main():
                self._claim()
            barrier()
            self.about = {"row": row, "command": command, "out": str(self.out_dir.resolve())}
            self._write_about()
            yield

    def _claim(self) -> None:
        """UserError where the folder holds what a run would write and no run has written."""
        if not (self.out_dir / "run.json").exists():
            foreign = [name for name in WRITTEN if (self.out_dir / name).exists()]
            if foreign:
                raise UserError(f"{self.out_dir}: holds {', '.join(foreign)} of something else; name another --out")

    def _write_about(self) -> None:
        if is_main():
            write_json(self.out_dir / "run.json", {**self.about, "keys": self.keys})

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, None where there is none. Raises DamagedFile."""
        with suppress(FileNotFoundError):
            return read_record(self._path(stage), RECORD)
        return None

    def _path(self, stage: str) -> Path:
        return self.out_dir / "stages" / f"{stage}.json"

    def key(self, stage: str, settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
        return digest([stage, settings, [self.keys[name] for name in inputs]])

    def run(
        self, stage: str, settings: Mapping[str, Any], inputs: Sequence[str], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The outputs of `stage`: those on record for the same settings and inputs, else those of `work()`.

        `work` gives {"outputs": JSON, "files": names relative to the folder, and costs: "images",
        "network_evaluations", "training_images"}; it may have been begun by an earlier run and must go on from there.
        """
        settings = json.loads(json.dumps(settings, default=str))
        key = self.keys[stage] = self.key(stage, settings, inputs)
        self._write_about()
        self.on_stage(stage)
        record = broadcast_object(self._valid_record(stage, key) if is_main() else None)
        if record is not None:
            print0(f"{stage}: done")
            return record["outputs"]
        print0(f"{stage}: begins")
        with _Clock(self.out_dir / "stages" / f".{stage}.clock", key) as clock:
            done = json.loads(json.dumps(work(), default=str))
        files = done.pop("files", [])
        record = {
            "stage": stage,
            "key": key,
            "settings": settings,
            "inputs": {name: self.keys[name] for name in inputs},
            "outputs": done.pop("outputs", {}),
            "files": files,
            "identities": {name: identity(self.out_dir / name) for name in files} if is_main() else {},
            "cost": {"seconds": round(clock.seconds, 1), **done},
            "starts": clock.starts,
            "world_size": world_size(),
        }
        if is_main():
            write_record(self._path(stage), record)
            clock.remove()
        barrier()
        return record["outputs"]

    def _valid_record(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record of a stage, if it was made with the same key and its files are as they were left."""
        record = intact(self._path(stage), read_record, RECORD)
        if record is None or record["key"] != key:
            return None
        identities = record.get("identities", {})
        missing = [name for name in record["files"] if not (self.out_dir / name).exists()]
        changed = [n for n in identities if n not in missing and not unchanged(self.out_dir / n, identities[n])]
        for name in changed:
            set_aside(self.out_dir / name, f"not as {stage} left it")
        return None if missing or changed else record


class _Clock:
    """Seconds spent on a stage, over all its starts; on rank 0 also in a file, so that a kill loses a few seconds."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.earlier, self.starts = 0.0, 1
        with suppress(OSError, UserError):  # a clock never stops a run
            saved = intact(path, read_record, CLOCK) if is_main() else None
            if saved and saved["key"] == key:
                self.earlier, self.starts = saved["seconds"], saved["starts"] + 1

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.began

    def __enter__(self) -> _Clock:
        self.began = time.monotonic()
        self._stop = threading.Event()
        if is_main():
            self._write()
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if is_main():
            self._thread.join()
            self._write()

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _tick(self) -> None:
        while not self._stop.wait(TICK):
            self._write()

    def _write(self) -> None:
        with suppress(OSError, UserError):
            write_json(self.path, {"key": self.key, "seconds": round(self.seconds, 1), "starts": self.starts})


def status(out_dir: str | Path) -> str:
    """The finished stages, their cost, the next stage; damaged records are named. Raises UserError where there is no
    run."""
    out_dir = Path(out_dir)
    if not (out_dir / "run.json").exists():
        raise UserError(f"{out_dir}: no run.json there; name the --out folder of a `neon reproduce`")
    run, problem = _peek(out_dir / "run.json", {"row": str, "command": str, "keys": dict})
    run = run or {"row": "a run", "command": f"the same command again ({problem})", "keys": {}}
    lines = [
        f"{run['row']} in {out_dir}",
        f"{'stage':>10} {'':<9} {'seconds':>10} {'images':>10} {'network evals':>14}",
    ]
    following = None
    for stage in STAGES:
        record, problem = _peek(out_dir / "stages" / f"{stage}.json", RECORD)
        if record and record["key"] == run["keys"].get(stage, record["key"]) and not following:
            cost = record["cost"]
            images = cost.get("images") or cost.get("training_images")
            cells = f"{_count(cost.get('seconds'), '.1f'):>10} {_count(images):>10}"
            lines.append(f"{stage:>10} {'done':<9} {cells} {_count(cost.get('network_evaluations')):>14}")
            continue
        following = following or stage
        begun, _ = _peek(out_dir / "stages" / f".{stage}.clock", CLOCK)
        state = f"{'begun':<9} {begun['seconds']:>10.1f}" if begun else f"to do {problem}"
        lines.append(f"{stage:>10} {state}".rstrip())
    if run.get("out", str(out_dir.resolve())) != str(out_dir.resolve()):
        lines.append(f"moved here from {run['out']}: name {out_dir} as --out instead")
    end = f"next: {following}; go on with: {run['command']}" if following else f"complete: {out_dir / 'report.html'}"
    return "\n".join([*lines, end])


def _peek(path: Path, types: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """(the record, ""), or (None, the problem with it); nothing is moved."""
    try:
        return read_record(path, types), ""
    except OSError:
        return None, ""
    except DamagedFile as error:
        return None, f"{path.name}: damaged, {error.problem}"
    except UserError as error:
        return None, error.message


def _count(number: Any, form: str = ",") -> str:
    return f"{number:{form}}" if number and isinstance(number, NUMBER) else "-"
