"""What a run survives: kills and signals at random moments on 1 to 3 ranks, writes that fail, and damage in its files.

    python benchmarks/chaos.py --out /big/enough/folder            # 30 runs, 20 faults, 100 mutations: ten minutes
    python benchmarks/chaos.py --out FOLDER --runs 3 --faults 2 --mutations 10 --seed 1

The row is the tests' pico row, from S to its report, with random moments drawn from --seed. A run counts as right when
its images are those of an unbroken run bit for bit, its weights within 1e-6, its choice and FID the same, its log
whole, and nothing of a killed write is left. A fault or a mutation counts as right when the run then ends with the same
numbers, or with one line that names the file. The last lines are a table.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import click
import torch
from core.pico_rows import CPU, PLAN, make_files, pico_row
from launch import kill_tree, launch, start

from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_run.reproduce.ledger import status
from neon_run.reproduce.reproduction import Reproduction

SCRIPT = Path("tests/core/pico_reproduce.py")
READ_NO_MORE = (".png", ".jsonl")  # images and log of a finished fine-tune
LEFTOVERS = (".part", ".lock", ".owner", ".clock", ".damaged")


def difference(out: Path, whole: Path) -> str:
    """How a finished run differs from the unbroken one, "" where it does not."""
    ours, theirs = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (out, whole))
    if ours["best"]["snapshot"] != theirs["best"]["snapshot"] or abs(ours["best"]["w"] - theirs["best"]["w"]) > 1e-6:
        return "another choice"
    if abs(ours["final"]["neon"]["fid"] - theirs["final"]["neon"]["fid"]) > 1e-6:
        return "another FID"
    images = sorted(path.relative_to(whole) for path in (whole / "synthetic").rglob("*.png"))
    if any((out / name).read_bytes() != (whole / name).read_bytes() for name in images):
        return "other images"
    for name in (path.relative_to(whole) for path in (whole / "finetune").glob("*.safetensors")):
        a, b = (read_checkpoint(folder / name).state for folder in (out, whole))
        if any(not torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in b):
            return f"other weights in {name}"
    lines = [(folder / "finetune/log.jsonl").read_text(encoding="utf-8").count("\n") for folder in (out, whole)]
    return "" if lines[0] == lines[1] else "a log with other lines"


def leftovers(out: Path) -> list[str]:
    return [str(path) for path in out.rglob("*") if path.suffix in LEFTOVERS or path.name == "state.pt"]


def broken_run(draw: random.Random, files: Path, out: Path, whole: Path) -> tuple[str, str]:
    """(the story, what is wrong): two starts are killed or stopped, the third ends."""
    story = []
    for _ in range(2):
        ranks, how = draw.choice([1, 2, 3]), draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        process, end = start(SCRIPT, files, out, ranks=ranks, PICO_PAUSE=0.03), time.monotonic() + draw.uniform(0.3, 6)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        story.append(f"{ranks} ranks, {how.name if process.poll() is None else 'ended'}")
        if how == signal.SIGTERM:
            for rank in process.processes:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, how)
            process.wait(60)
        kill_tree(process)
    done = launch(SCRIPT, files, out, ranks=draw.choice([1, 2, 3]))
    if done.returncode:
        return "; ".join(story), done.stderr.strip()[-300:]
    return "; ".join(story), difference(out, whole) or ", ".join(leftovers(out))


def in_process(files: Path, out: Path) -> str:
    """ "" where the run ends, else the one line that a user sees. Whatever else is raised is a failure."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            Reproduction(pico_row(files), out, PLAN, CPU).run()
        except UserError as error:
            return error.message
    return ""


def failed_write(draw: random.Random, files: Path, out: Path, whole: Path) -> tuple[str, str]:
    """(where, what is wrong): a file system that lets no file grow beyond a random size, then one that does."""
    limit = draw.choice([10, 300, 3_000, 10_000, 30_000])
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, earlier[1]))
    try:
        message = in_process(files, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    if message and str(out) not in message:
        return f"files of {limit} bytes", f"names no file: {message}"
    return f"files of {limit} bytes", in_process(files, out) or difference(out, whole) or ", ".join(leftovers(out))


def mutate(draw: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "emptied", "a bit", "bytes", "a list", "an object"])
    place = draw.randrange(len(content)) if content else 0
    if kind == "a bit" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        content[place : place + 20] = draw.randbytes(20)
    else:
        other = {"cut": content[:place], "emptied": b"", "a list": b"[1, 2]", "an object": b'{"key": [1]}'}
        content = other.get(kind, content)
    path.write_bytes(bytes(content))
    return kind


def damaged_file(draw: random.Random, files: Path, out: Path, whole: Path) -> tuple[str, str]:
    """(file and damage, what is wrong): one file of a finished run, some of whose stages are to be done again."""
    shutil.copytree(whole, out)
    for stage in draw.sample(["generate", "finetune", "search", "evaluate"], draw.randrange(3)):
        (out / f"stages/{stage}.json").unlink()
    path = draw.choice(sorted(path for path in out.rglob("*") if path.is_file() and path.suffix not in READ_NO_MORE))
    story = f"{path.relative_to(out)}: {mutate(draw, path)}"
    status(out)
    message = in_process(files, out)
    if message:
        return story, "" if str(path) in message or str(path.parent) in message else f"names no file: {message}"
    return story, difference(out, whole)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--runs", default=30, show_default=True)
@click.option("--faults", default=20, show_default=True)
@click.option("--mutations", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, runs: int, faults: int, mutations: int, seed: int) -> None:
    """See above."""
    torch.set_num_threads(1)
    files, whole, draw = out / "files", out / "whole", random.Random(seed)
    files.mkdir(parents=True)
    make_files(files)
    in_process(files, whole)
    table = Counter()
    for kind, count, trial in (("killed twice", runs, broken_run), ("no room on the disk", faults, failed_write),
                               ("a damaged file", mutations, damaged_file)):  # fmt: skip
        for number in range(count):
            folder = out / f"{kind.replace(' ', '-')}-{number}"
            try:
                story, problem = trial(draw, files, folder, whole)
            except Exception as error:  # a traceback is what is looked for
                story, problem = "", f"{type(error).__name__}: {error}"
            table[kind, not problem] += 1
            if problem:
                click.echo(f"{folder}: {story}: {problem}")
            else:
                shutil.rmtree(folder)
    for kind, count in (("killed twice", runs), ("no room on the disk", faults), ("a damaged file", mutations)):
        click.echo(f"{kind:>22}: {table[kind, True]} of {count} right")


if __name__ == "__main__":
    main()
