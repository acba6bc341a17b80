"""A GPU that is not there: tensors on "cuda" without numbers, and a record of what a real one would have had to do.

Tensors on "cuda" are fake (shapes, dtypes and devices only) while those on the CPU stay real, so that the product's
own code runs as it does on a GPU. Mixed devices and wrong dtypes raise as they would there. Stubbed are only
generators, the state of random numbers, and the questions that need a driver.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from needs import SIMULATED_GPU
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from neon_edm.augment import constant
from neon_metrics.inception import _source_samples
from neon_run.check.launches import SILENT, Memory

GPU = torch.device("cuda", 0)
META = torch.device("meta")
GIB = 2**30
aten = torch.ops.aten

NUMBERS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"}
DATA_DEPENDENT = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::repeat_interleave"}
FAKE = FakeTensorMode()
CACHES = (constant, _source_samples)  # what the product keeps on a device from one call to the next


WEIGHTS: set[int] = set()  # storages of parameters


class Generator(torch.Generator):
    """Says that it lives on the GPU. Draws nothing: fake tensors have no numbers."""

    @property
    def device(self) -> torch.device:
        return GPU


def _generator(device: torch.device | str = "cpu") -> torch.Generator:
    return Generator() if torch.device(device).type == "cuda" else _RealGenerator(device)


_RealGenerator = torch.Generator


class Record(TorchDispatchMode):
    """What was asked of the GPU since the last `reset`.

    A backward pass runs on streams of the device, which there are none of. So autograd is told that its tensors are on
    "meta", for which it wants none; everything else is told the truth.
    """

    def __init__(self):
        super().__init__()
        self.graph_only = ""  # a stage ("leaves", "backward") in which only autograd asks for devices
        self._fresh: set[int] = set()  # outputs of the last operation that autograd is about to enter into its graph
        self.memory = Memory()  # of the GPU
        self.reset()

    def reset(self) -> None:
        """Forget the counts; storages that live stay counted, and are the new peak."""
        self.ops: Counter[str] = Counter()
        self.launches = 0  # kernels and copies; views and allocations are none
        self.syncs: Counter[str] = Counter()  # where the CPU waits for a number
        self.uploads = 0  # copies from the CPU
        self.weight_casts = 0  # conversions of a parameter to another dtype
        self.memory.peak = self.forward_peak = self.memory.live  # the latter: before the last backward pass

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.memory.peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:  # C++ was told so, below
            kwargs["device"] = GPU
        tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if not fake and not _on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "prim::device":  # asked by C++: by autograd for its graph, or by autocast
            recomputes = self.graph_only == "backward" and torch.is_grad_enabled()
            entered = (self.graph_only and not recomputes) or id(tensors[0]) in self._fresh
            self._fresh.discard(id(tensors[0]))
            return META if entered else tensors[0].fake_device
        if name == "aten::to":  # what inference mode shows
            func, name, kwargs = aten._to_copy.default, "aten::_to_copy", _wanted(args, kwargs)
            args = args[:1]
            if _changes_nothing(args[0], kwargs):
                return args[0]
        if name == "aten::_to_copy" and "device" in kwargs and _changes_nothing(tensors[0], kwargs):
            func, kwargs, name = aten.alias.default, {}, "aten::alias"
        if "generator" in kwargs:
            kwargs["generator"] = None
        if name not in SILENT and not func.is_view and not (name == "aten::dropout" and not args[2]):
            self._note(name, tensors, kwargs)
        if name in NUMBERS:
            return 1.0 if tensors[0].dtype.is_floating_point else 1  # true, finite, positive
        if len([x for x in tensors if isinstance(x, FakeTensor)]) < len(tensors):
            args, kwargs = tree_map(_faked, (args, kwargs))
        with FAKE:
            out = func(*args, **kwargs)
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, FakeTensor)]
        for x in outputs:
            if x.fake_device.type == "cuda":
                self.memory.see(x.untyped_storage())
        entered = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        self._fresh = {id(x) for x in outputs} if entered else set()
        if entered and name.endswith("_") and outputs and outputs[0]._is_view():
            self._fresh.add(id(outputs[0]._base))  # what changes with the view
        return out

    def leaves(self, parameters: Iterable[Tensor]) -> None:
        """Enter parameters into autograd's graph, before anything else can ask for their device."""
        self.graph_only = "leaves"
        self.accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters]
        self.graph_only = ""

    def _note(self, name: str, tensors: list[Tensor], kwargs: dict) -> None:
        on_gpu = [isinstance(x, FakeTensor) and x.fake_device.type == "cuda" for x in tensors]
        target = kwargs.get("device")
        if name in NUMBERS:
            self.syncs["number"] += 1
        elif name in DATA_DEPENDENT:
            self.syncs[name] += 1
        elif any(on_gpu) and ((target and not _on_gpu(target)) or (name == "aten::copy_" and not on_gpu[0])):
            self.syncs["copy to the CPU"] += 1
        elif any(not gpu and x.dim() for gpu, x in zip(on_gpu, tensors, strict=True)) or (not any(on_gpu) and tensors):
            self.uploads += 1
        elif name == "aten::_to_copy" and tensors[0].untyped_storage()._cdata in WEIGHTS:
            self.weight_casts += 1
        self.ops[name] += 1
        self.launches += 1


def _on_gpu(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _changes_nothing(x: FakeTensor, kwargs: dict) -> bool:
    """Does `.to(...)` ask for what x is already? (On a GPU C++ sees that by itself.)"""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    same = (device is None or torch.device(device).type == x.device.type) and dtype in (None, x.dtype)
    return same and kwargs.get("memory_format") in (None, torch.preserve_format)


def _wanted(args: tuple, kwargs: dict) -> dict:
    """Device and dtype among the arguments of a `.to(...)`."""
    given = [*args[1:], *kwargs.values()]
    kinds = {"dtype": torch.dtype, "device": torch.device, "memory_format": torch.memory_format}
    return {name: value for name, kind in kinds.items() for value in given if isinstance(value, kind)}


def _flat(args) -> Iterator:
    """The arguments, and the elements of those that are lists."""
    for x in args:
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
    """The kernel that a GPU takes: flash in half precision without a mask, else the memory-efficient one. (Which one it
    is, PyTorch asks the device itself, and without one it computes the whole matrix of weights.)"""
    if q.device.type != "cuda":
        return _real_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **rest)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v, attn_mask = (x if x is None or x.dtype == dtype else x.to(dtype) for x in (q, k, v, attn_mask))
    if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]


_real_backward = torch.autograd.backward
_real_attention = torch.nn.functional.scaled_dot_product_attention


def _faked(x):
    return FAKE.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x


@contextmanager
def fake_cuda() -> Iterator[Record]:
    """Inside, "cuda" is a device with fake tensors; yields the record of what is done there."""
    if SIMULATED_GPU.args[0]:
        pytest.skip(SIMULATED_GPU.kwargs["reason"])
    torch._C._ensureCUDADeviceGuardSet()  # a guard that changes no device, where there is no driver
    state = torch.zeros(16, dtype=torch.uint8)
    with ExitStack() as stack:
        for place, name, value in (
            (torch, "Generator", _generator),
            (torch.nn.functional, "scaled_dot_product_attention", _attention),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "get_rng_state", lambda *_: state),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch.cuda, "manual_seed_all", lambda *_: None),
            (torch.cuda, "manual_seed", lambda *_: None),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        for kept in CACHES:
            stack.callback(kept.cache_clear)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the CPU, then copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        record = Record()

        def backward(*args, **kwargs):
            record.graph_only, record.forward_peak = "backward", record.peak
            try:
                return _real_backward(*args, **kwargs)
            finally:
                record.graph_only = ""

        stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
        yield stack.enter_context(record)


def built(
    make: Callable[..., torch.nn.Module], *args, memory_format: torch.memory_format = torch.contiguous_format, **kwargs
) -> torch.nn.Module:
    """The module make(*args, **kwargs) on the fake GPU. A later `.to` leaves it there: fake parameters do not move."""
    with _disable_current_modes(), torch.device("meta"):
        module = make(*args, **kwargs)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                wanted = memory_format if parameter.dim() == 4 else torch.contiguous_format
                strides = torch.empty_like(parameter, memory_format=wanted).stride()
                value = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=GPU)
                storage = value.untyped_storage()
                WEIGHTS.add(storage._cdata)
                weakref.finalize(storage, WEIGHTS.discard, storage._cdata)
                part._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    module.to = lambda *_, **__: module
    return module
