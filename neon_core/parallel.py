"""How one network is spread over ranks in a fine-tune: replicated (DDP) or sharded (FSDP2), with or without activation
checkpointing. Neither changes the numbers, beyond the rounding of sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from neon_core.distributed import is_main, rank, world_size
from neon_files.errors import UserError

MODES = ("ddp", "fsdp")


def dealt(count: int) -> range:
    """Numbers of the micro batches that this rank computes, of `count` in a step. Every rank computes equally many,
    since all take part in every collective: a number from `count` on repeats a micro batch with weight 0."""
    rounds = -(-count // world_size())
    return range(rank(), rounds * world_size(), world_size())


def shard(net: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Shard the parameters of `net` over all ranks, in place, each of `blocks` as a unit. Raises UserError."""
    if not dist.is_initialized():
        raise UserError("--parallel fsdp needs several processes; start the script with torchrun")
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UserError(f"--parallel fsdp needs torch 2.6 or newer, this is {torch.__version__}; use ddp") from error
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # channels_last cannot be sharded
    for block in blocks:
        fully_shard(block)
    fully_shard(net)


def replicate(loss: nn.Module, unused_parameters: bool) -> nn.Module:
    """`loss` with gradients averaged over ranks; itself where there is one process."""
    if not dist.is_initialized():
        return loss
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # the older name
    options: dict[str, Any] = {"find_unused_parameters": unused_parameters, buffers: False}
    return DistributedDataParallel(loss, gradient_as_bucket_view=True, **options)


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Recompute each block in the backward pass instead of keeping its activations. Raises UserError without blocks."""
    if not blocks:
        raise UserError("--activation_checkpointing: this network names no blocks to recompute; leave the flag out")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_activations(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_activations`."""
    for block in blocks:
        block.__dict__.pop("forward", None)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, the tensor itself otherwise. A collective: every rank calls it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_rank_0(tensor: Tensor) -> Any:
    """`whole` in the host's memory on rank 0, None elsewhere: no rank holds more than one full tensor at a time."""
    full = whole(tensor.detach())
    return full.cpu() if is_main() else None


@torch.no_grad()
def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A copy of a full tensor, laid out as `reference` is: device, strides, shards. Fused optimizers read memory in
    the order of the parameter's, whatever the strides."""
    if hasattr(reference, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(reference, DTensor)
        tensor = distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)


def optimizer_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """{parameter number: {name: full tensor}} on rank 0, the same for replicated and sharded runs. A collective."""
    numbers = {id(p): i for i, p in enumerate(net.parameters())}
    return {
        numbers[id(p)]: {k: on_rank_0(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        for p, state in optimizer.state.items()
    }


def load_optimizer_state(net: nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore the result of `optimizer_state`."""
    fused = optimizer.defaults.get("fused", False)
    for number, parameter in enumerate(net.parameters()):
        for name, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim > 0:
                value = like(value, parameter)
            elif isinstance(value, Tensor):  # the step count: a fused optimizer keeps it with the parameter
                value = value.clone().to(parameter.device if fused else "cpu")
            optimizer.state[parameter][name] = value


def network_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict with full tensors, on rank 0. A collective."""
    return {name: on_rank_0(value) for name, value in net.state_dict().items()}


@torch.no_grad()
def load_network_state(net: nn.Module, saved: dict[str, Tensor]) -> None:
    """Restore the result of `network_state`."""
    for name, value in net.state_dict().items():
        value.copy_(like(saved[name], value))
