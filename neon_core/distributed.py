"""Ranks: set-up from torchrun's environment, tear-down, and errors that end all ranks with one message."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import click
import torch
import torch.distributed as dist

from neon_files.atomic import sha256_file
from neon_files.errors import UserError

TIMEOUT = timedelta(hours=1)  # of one collective: longer than any stage in which ranks wait for each other


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


def gather_objects(value) -> list:
    """Every rank's (picklable) value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def file_hash(path: str | Path) -> str:
    """sha256 of a file, computed once for all ranks. Every rank calls it."""
    return broadcast_object(sha256_file(path) if is_main() else "")


def pick_device(name: str) -> torch.device:
    """ "auto" -> CUDA where there is one, else the CPU; on CUDA each local rank has its own. Raises UserError."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device; choose auto, cpu or cuda") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise UserError(f"--device {name}: GPU {index} wanted, {count} present; start fewer processes or use cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def session(device_name: str = "auto") -> Iterator[torch.device]:
    """The device of this rank, with the process group of torchrun's environment around the body.

    nccl serves CUDA tensors and gloo CPU tensors; without a launcher there is one process and no group. Where a rank
    fails, the first to fail prints its error, all others leave silently, and every exit status is not 0.
    """
    if "RANK" not in os.environ:
        yield pick_device(device_name)
        return
    store, this_rank, ranks = next(iter(dist.rendezvous("env://")))
    store.set_timeout(TIMEOUT)
    try:
        device = pick_device(device_name)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("neon", store), rank=this_rank, world_size=ranks, timeout=TIMEOUT
        )
        yield device
        dist.barrier()
    except BaseException as error:
        _leave(error, dist.PrefixStore("neon_failures", store))
    dist.destroy_process_group()


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
    if isinstance(error, KeyboardInterrupt):
        code = 130
    elif first and isinstance(error, click.ClickException):
        error.show()
    elif first and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
