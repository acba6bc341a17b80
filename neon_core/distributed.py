"""Ranks: set-up from a launcher's environment, tear-down, and errors that end all ranks with one message."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
import torch.distributed as dist

from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_files.launcher import end_with_launcher, is_launched, refuse
from neon_files.stopping import Stopped, asked, signals_raise

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # of one collective: longer than any stage in which ranks wait for each other
START_TIMEOUT = timedelta(minutes=10)  # in which all ranks must have started
LOOK_SECONDS = 1.0  # at most, between two looks at whether rank 0 has finished its own work
_calls = itertools.count()  # of `on_rank_0`, the same on every rank
_stores: list[dist.Store] = []  # of the session
_groups: list[Any] = []  # kept, since torch 2.5 may wait forever where one ends: it holds the lock of Python that its
# thread needs to forget its last barrier


def rank() -> int:
    """0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def print0(*parts, **options) -> None:
    """`print` on rank 0, at once."""
    if is_main():
        print(*parts, flush=True, **options)


def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; nothing to do for one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value):
    """Rank 0's (picklable) value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(work: Callable[[], T]) -> T:
    """Rank 0's (picklable) value of `work` on every rank. It has all cores; the others look now and then whether it has
    finished, in no collective, so that it may take longer than `TIMEOUT`. Every rank calls it."""
    if not dist.is_initialized():
        return work()
    finished, failures = (dist.PrefixStore(name, _stores[-1]) for name in ("neon_finished", "neon_failures"))
    key, value = f"{next(_calls)}", None
    if is_main():
        threads = torch.get_num_threads()
        torch.set_num_threads(cores())
        try:
            value = work()
        finally:
            torch.set_num_threads(threads)
        finished.set(key, "")
    else:
        pause = 0.002
        while not finished.check([key]):
            if failures.check(["count"]):
                raise RuntimeError("another rank has failed")  # with its own message
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS)
    return broadcast_object(value)


def cores() -> int:
    """Those that this process may use, whatever number of threads a launcher has set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gather_objects(value) -> list:
    """Every rank's (picklable) value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(*numbers: int) -> list[int]:
    """Each number's maximum over ranks. The hosts wait for each other, but for no device."""
    if not dist.is_initialized():
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def agree(subject: str | Path, look: Callable[[], T], describe: Callable[[T], Any] = lambda value: value) -> T:
    """The value of `look` once it is the same on all ranks: shared file systems show some machines new files late.

    `describe` returns the part to compare, by default the value itself. Every rank calls it. Retries for a minute
    (NEON_SHARED_FILES_SECONDS), then raises UserError that names the difference; an error that `look` raises on all
    ranks is raised at once.
    """
    began, patience = time.monotonic(), float(os.environ.get("NEON_SHARED_FILES_SECONDS", 60))
    while True:
        error: UserError | None = None
        try:
            value = look()
            view = describe(value)
        except UserError as raised:
            error, view = raised, raised.message
        views = gather_objects((view, error is not None, time.monotonic() - began > patience))
        others = [number for number, other in enumerate(views) if other[:2] != views[0][:2]]
        if not others:
            if error is None:
                return value
            raise error
        if views[0][2]:
            seen = [str(views[number][0])[:200] for number in (0, others[0])]
            raise UserError(
                f"{subject}: rank 0 sees {seen[0]}, rank {others[0]} sees {seen[1]}; put it where all machines see "
                "the same files"
            )
        time.sleep(min(1.0, patience / 4))


def file_hash(path: str | Path) -> str:
    """sha256 of a file, computed once for all ranks. Every rank calls it."""
    return on_rank_0(lambda: sha256_file(path))


def pick_device(name: str) -> torch.device:
    """ "auto" -> CUDA where there is one, else the CPU; on CUDA each local rank has its own. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device; choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; choose auto, cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", _gpu(name, device.index))
        torch.cuda.set_device(device)
    return device


def _gpu(name: str, requested: int | None) -> int:
    count, ranks = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1))
    if not count:
        raise UserError(f"--device {name}: no GPU is visible here; choose auto or cpu")
    if requested is None and count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):  # the launcher dealt the GPUs
        return 0
    if requested is None and "LOCAL_RANK" not in os.environ and ranks > 1 and count > 1:
        raise UserError("RANK is set but LOCAL_RANK is not, which assigns the GPUs; start with torchrun")
    index = requested if requested is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise UserError(f"--device {name}: GPU {index} requested, {count} present; start fewer processes or use cpu")
    return index


@contextmanager
def session(device_name: str = "auto") -> Iterator[torch.device]:
    """The device of this rank, with the process group of a launcher's environment around the body.

    nccl serves CUDA tensors and gloo CPU tensors; without a launcher there is one process and no group. Where a rank
    fails, the first to fail prints its error, all others leave silently, and every exit status is not 0. SIGTERM and
    Ctrl-C end the process with 143 and 130, after one line with the command that continues.
    """
    if not is_launched():
        with signals_raise():
            try:
                yield pick_device(device_name)
            except Stopped as stopped:
                print(stopped, file=sys.stderr, flush=True)
                sys.exit(stopped.exit_code)
        return
    store, this_rank, ranks = _meet()
    end_with_launcher()
    _stores.append(store)
    with signals_raise():
        try:
            device = pick_device(device_name)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("neon", store), rank=this_rank, world_size=ranks, timeout=TIMEOUT
            )
            _check_gpus(device)
            yield device
            dist.barrier()
        except BaseException as error:
            _leave(error, dist.PrefixStore("neon_failures", store))
    _groups.append(dist.group.WORLD)
    dist.destroy_process_group()


def _meet() -> tuple[dist.Store, int, int]:
    """(store, rank, number of ranks), once all ranks have started."""
    try:
        store, this_rank, ranks = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))
    except (RuntimeError, OSError) as error:
        where, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            refuse(f"{where}: this port is taken; set another MASTER_PORT, or start with torchrun --standalone")
        refuse(f"{where}: the ranks do not find each other there ({reason}); check MASTER_ADDR and MASTER_PORT")
    store.set_timeout(TIMEOUT)
    return store, this_rank, ranks


def _check_gpus(device: torch.device) -> None:
    """UserError where two ranks have the same GPU."""
    if device.type != "cuda":
        return
    gpus = gather_objects((socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)))
    for number, gpu in enumerate(gpus):
        if gpu in gpus[:number]:
            raise UserError(f"ranks {gpus.index(gpu)} and {number} have the same GPU; start fewer processes")


def _leave(error: BaseException, store: dist.Store) -> None:
    """End this process after a failure. Never returns: collectives of the other ranks may be waiting for us, and an
    orderly tear-down would wait for them."""
    try:
        first = store.add("count", 1) == 1
    except Exception:  # the store went down with rank 0, which has printed
        first = False
    code = error.exit_code if isinstance(error, click.ClickException) else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    if asked():  # an error here may only be that another rank has stopped
        code = 128 + asked()
    if isinstance(error, Stopped):
        code = error.exit_code
        if first:
            print(f"\n{error}", file=sys.stderr)  # the progress bar of rank 0 may be there
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    elif first and isinstance(error, click.ClickException):
        error.show()
    elif first and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
