"""Start scripts as a user would: alone, or on several gloo ranks through torchrun's module."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def command(script: str | Path, *args, ranks: int = 0) -> list[str]:
    """`ranks=0`: a plain process without launcher."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, str(ROOT / script), *map(str, args)]


def environment(**extra) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in extra.items()}}


def launch(script, *args, ranks: int = 0, timeout: float = 180, cwd=None, **env) -> subprocess.CompletedProcess:
    """Run to the end; stdout and stderr as text."""
    return subprocess.run(
        command(script, *args, ranks=ranks), env=environment(**env), cwd=cwd or ROOT, timeout=timeout,
        capture_output=True, text=True,
    )  # fmt: skip


def start(script, *args, ranks: int = 0, cwd=None, **env) -> subprocess.Popen:
    """Start and return at once; end it with `kill_tree`."""
    return subprocess.Popen(
        command(script, *args, ranks=ranks), env=environment(**env), cwd=cwd or ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL, as a power cut: the launcher first, so that it cannot tidy up, then its workers."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait()
