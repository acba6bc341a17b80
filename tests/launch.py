"""Run scripts as a user would: in this process, in one of their own, or as several gloo ranks.

`import torch` takes two seconds, so processes are forked from a server that has it imported already. What a script
sees is what `python SCRIPT` and torchrun give it: arguments, environment, paths, a store that the launcher holds.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import connection
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel", "click.testing", "psutil",
           "PIL.Image", "scipy.linalg", "safetensors.torch"]  # fmt: skip

# ------------------------------------------------------------------------------------------------- in this process


def module(script: str | Path) -> ModuleType:
    """A script as a module; the paths that it adds for itself are taken back."""
    path, kept = ROOT / script, list(sys.path)
    name = "_".join(path.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.path[:] = kept
    return loaded


def call(script: str | Path, *args) -> str:
    """stdout of `python SCRIPT ARGS` in this process. Only what a script does not catch is raised."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = _run(script, args)
    assert status == 0, f"exit status {status}"
    return out.getvalue()


def fails(script: str | Path, *args, match: str = "") -> str:
    """The one line that a user sees of a script that ends with exit status 2; `match` is found in it."""
    err = io.StringIO()
    with redirect_stderr(err):
        status = _run(script, args)
    assert status == 2, err.getvalue()
    (line,) = [line for line in err.getvalue().splitlines() if line.startswith("Error:")]
    assert re.search(match, line), line
    return line


def _run(script: str | Path, args: tuple) -> int:
    kept = sys.argv, sys.path
    sys.argv, sys.path = [str(ROOT / script), *map(str, args)], list(sys.path)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, sys.path = kept
    return 0


KEPT: list[dist.ProcessGroup | None] = []  # for the reason that `neon_core.distributed` has


@contextmanager
def own_group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        KEPT.append(dist.group.WORLD)
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------- in processes of its own


class Ranks:
    """The running processes of one start. `returncode`: None, then 0 or the first status in rank order that is not."""

    def __init__(self, processes: list, store: dist.TCPStore | None):
        self.processes, self.store = processes, store

    @property
    def returncode(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until all have ended by themselves. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        running = {process.sentinel for process in self.processes}
        while running:
            left = None if end is None else max(0.0, end - time.monotonic())
            ended = connection.wait(running, left)
            if not ended:
                raise subprocess.TimeoutExpired(self.processes[0].name, timeout)
            running -= set(ended)
        return self.returncode


STARTED: weakref.WeakSet[Ranks] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """What a failing test left running; multiprocessing would wait for it."""
    for ranks in list(STARTED):
        kill_tree(ranks)


def environment(**extra) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, **ALONE, **{k: str(v) for k, v in extra.items()}}


class Completed(subprocess.CompletedProcess):
    """`returncode` is that of `Ranks`."""

    returncodes: list[int]  # of every rank


def launch(script, *args, ranks: int = 0, timeout: float = 300, cwd=None, **env) -> Completed:
    """Run to the end; stdout and stderr as text. `ranks=0`: a plain process without a launcher's environment. `script`
    may be "-c", as Python takes it: the first argument is the code.

    Unlike torchrun, nothing ends the other ranks where one fails: they have to end by themselves before `timeout`.
    """
    if ranks and torch.cuda.is_available():
        pytest.skip("--gpu: the ranks of a test have none, and what they draw is compared with a CPU's")
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        running = _start(script, args, ranks, cwd, env, files)
        try:
            running.wait(timeout)
        finally:
            kill_tree(running)
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
    done = Completed([str(script), *map(str, args)], running.returncode, *texts)
    done.returncodes = [process.exitcode for process in running.processes]
    return done


def start(script, *args, ranks: int = 0, cwd=None, **env) -> Ranks:
    """Start and return at once; end it with `kill_tree`."""
    return _start(script, args, ranks, cwd, env, [os.devnull] * 2)


def kill_tree(running: Ranks) -> None:
    """SIGKILL, as a power cut, for every rank and all that it started."""
    family = []
    for process in running.processes:
        with suppress(psutil.NoSuchProcess):
            family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family if running.poll() is None else ():
        with suppress(psutil.NoSuchProcess):
            member.kill()
    running.wait(30)


def kill_when(running: Ranks, condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """`kill_tree` as soon as `condition()` holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, "ended before it could be killed"
        assert time.monotonic() < limit, "never got to the point of the kill"
        time.sleep(0.02)
    kill_tree(running)


def torchrun(script, *args, ranks: int, timeout: float = 300, **env) -> subprocess.CompletedProcess:
    """`launch` with the real launcher, which takes several seconds for itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / script), *map(str, args)]
    return subprocess.run(command, env=environment(**env), cwd=ROOT, timeout=timeout, capture_output=True, text=True)


def _start(script, args, ranks: int, cwd, env: dict, files: list[str]) -> Ranks:
    store, shared = None, environment(**env)
    if ranks:  # as torchrun: the launcher holds the store, on a port that is surely free
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    context, processes = forkserver(), []
    file = script if script == "-c" else str(ROOT / script)
    for rank in range(max(ranks, 1)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
        given = (file, [str(arg) for arg in args], str(cwd or ROOT), shared | own, files)
        processes.append(context.Process(target=_be_the_script, args=given, name=str(script)))
        processes[-1].start()
    running = Ranks(processes, store)
    STARTED.add(running)
    return running


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Its processes have torch imported. One server per test process, started here the first time, with the environment
    that imports read."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    kept = dict(os.environ)
    os.environ.update(ALONE)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return context


def _be_the_script(script: str, args: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """In the forked process: what `python SCRIPT ARGS` begins with, then the script."""
    sys.stdout.flush()
    for descriptor, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # appended to by all ranks
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tests_only = {str(ROOT / folder) for folder in (".", "VAR", "xAR", "edm", "imm", "tests")}
    given = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*given, *(folder for folder in sys.path if folder not in tests_only)]
    if script == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *args[1:]]
        exec(args[0], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *args]
        runpy.run_path(script, run_name="__main__")
