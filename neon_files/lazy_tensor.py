"""Tensors and NumPy arrays of a pickle: described when it is read, decoded on demand.

`TABLE` tells the inert reader of pickles how to represent values of torch, NumPy and plain Python.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from neon_files.guard import Refused
from neon_files.inert import Function, Name, Record, as_key

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)}
_NUMPY_TYPE = re.compile(r"[<>=|]?([biufc]\d{1,2}|\?|[SU]\d{1,4})")
_FLAGS = {"conj", "neg"}  # views that torch has not written out
_DIMENSIONS = 64
_EXPANDED = 1 << 24  # elements of a tensor that shows the same memory again and again (stride 0)


class Storage:
    """Consecutive numbers in a file. `read` returns their bytes, which are kept, as tied tensors share them."""

    __slots__ = ("_data", "_read", "dtype", "nbytes")

    def __init__(self, dtype: torch.dtype, nbytes: int, read: Callable[[], UntypedStorage]):
        self.dtype, self.nbytes = dtype, nbytes
        self._read: Callable[[], UntypedStorage] | None = read  # None once read, which frees its buffer
        self._data: dict[frozenset[str], UntypedStorage] = {}

    def resolved(self) -> Storage:
        return self

    def load(self, flags: frozenset[str] = frozenset()) -> UntypedStorage:
        """The bytes; those of the conjugate ("conj") or negative ("neg") numbers, if asked for."""
        if flags not in self._data:
            if not flags:
                assert self._read is not None
                self._data[flags], self._read = self._read(), None
            else:
                numbers = torch.empty(0, dtype=self.dtype).set_(self.load())
                numbers = -numbers if "neg" in flags else numbers
                numbers = numbers.conj().resolve_conj() if "conj" in flags else numbers
                self._data[flags] = numbers.untyped_storage()
        return self._data[flags]


class LazyTensor:
    """A tensor of the file, decoded when `load` is called."""

    __slots__ = ("_dtype", "_flags", "_offset", "_storage", "_stride", "shape")

    def __init__(
        self,
        storage: Any,  # Storage, or an object whose `resolved()` returns one
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype | None = None,  # that of the storage, if None
        flags: dict[str, bool] | None = None,  # {"conj": True}
    ):
        sane = hasattr(storage, "resolved") and isinstance(size, tuple) and isinstance(stride, tuple)
        if not sane or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
            raise Refused("holds a tensor with an invalid description")
        sane = len(size) == len(stride) <= _DIMENSIONS and isinstance(flags, dict | None)
        if not sane or not isinstance(dtype, torch.dtype | None) or (flags and not _FLAGS.issuperset(flags)):
            raise Refused("holds a tensor with an invalid description")
        self._storage, self._offset, self.shape, self._stride = storage, offset, size, stride
        self._dtype, self._flags = dtype, frozenset(name for name, value in (flags or {}).items() if value)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or self._storage.resolved().dtype

    def load(self) -> Tensor:
        """On the CPU, no gradient; tensors that share memory in the file share it here. Raises Refused."""
        storage, dtype = self._storage.resolved(), self.dtype
        available, count = storage.nbytes // dtype.itemsize, math.prod(self.shape)
        last = self._offset + sum((n - 1) * step for n, step in zip(self.shape, self._stride, strict=True))
        if count > max(available, _EXPANDED) or (count and last >= available):  # `set_` would enlarge the storage
            raise Refused("holds a tensor that reaches beyond its storage")
        if self._flags and dtype != storage.dtype:
            raise Refused("holds a conjugate of numbers of another type")
        data = storage.load(self._flags)
        return torch.empty(0, dtype=dtype).set_(data, self._offset, self.shape, self._stride)


class Unreadable:
    """A tensor whose numbers are not in the file as such; `reason` continues "is"."""

    __slots__ = ("reason",)

    def __init__(self, reason: str):
        self.reason = reason

    def build(self, state: Any) -> None:
        """Its state is ignored."""


class StorageType:
    """The type of a storage: torch's FloatStorage and the like."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, flags=None) -> LazyTensor:
    return LazyTensor(storage, offset, size, stride, flags=flags)


def _typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, flags=None) -> LazyTensor:
    if not isinstance(dtype, torch.dtype):
        raise Refused("holds a tensor with an invalid description")
    return LazyTensor(storage, offset, size, stride, dtype, flags)


def _parameter(tensor, requires_grad=False, hooks=None, state=None) -> LazyTensor | Unreadable:
    if not isinstance(tensor, LazyTensor | Unreadable):
        raise Refused("holds a parameter that is no tensor")
    return tensor


_PLAIN_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


def _tensor_of_class(rebuild, kind, args, state=None) -> Any:
    if str(kind) in _PLAIN_TENSORS and isinstance(rebuild, Function) and isinstance(args, tuple):
        return rebuild.call(*args)
    if str(kind).endswith(".DTensor"):
        return Unreadable("one rank's part of a distributed tensor (DTensor)")
    return Unreadable(f"a tensor of the class {kind}")


def _unreadable(reason: str) -> Callable[..., Unreadable]:
    return lambda *args: Unreadable(reason)


class NumpyType:
    """np.dtype by its code. BUILD sets the byte order of this record, never that of NumPy's object."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any):
        self._code, self._order = code, ""

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise Refused("changes a NumPy type in an unknown way")
        self._order = state[1]

    def numpy(self) -> np.dtype:
        """Raises Refused for anything but numbers and text."""
        if not isinstance(self._code, str) or not _NUMPY_TYPE.fullmatch(self._code):
            raise Refused(f"holds NumPy values of the type {str(self._code)[:80]!r}, which is no plain number")
        try:
            return np.dtype(self._order.replace("|", "") + self._code.lstrip("<>=|"))
        except TypeError as error:
            raise Refused(f"names the NumPy type {self._code!r}, which does not exist") from error


class Array:
    """A NumPy array, decoded on demand."""

    __slots__ = ("_data", "_dtype", "_fortran", "_shape")

    def __init__(self, shape: Any = (), dtype: Any = None, fortran: Any = False, data: Any = b""):
        self._shape, self._dtype, self._fortran, self._data = shape, dtype, fortran, data

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("holds a NumPy array with an invalid description")
        _, self._shape, self._dtype, self._fortran, self._data = state

    def numpy(self) -> np.ndarray:
        """Read-only. Raises Refused for arrays of objects and for damaged ones."""
        dtype, shape, data = self._dtype, self._shape, self._data
        sane = isinstance(dtype, NumpyType) and isinstance(shape, tuple) and isinstance(data, bytes | bytearray)
        if not sane or len(shape) > _DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise Refused("holds a NumPy array of objects, or one with an invalid description")
        if math.prod(shape) * dtype.numpy().itemsize != len(data):
            raise Refused("holds a NumPy array whose numbers do not fill it")
        return np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if self._fortran else "C")


def _from_buffer(data, dtype, shape, order) -> Array:
    return Array(shape, dtype, order == "F", data)


def _scalar(dtype, data=b"") -> Any:
    if not isinstance(dtype, NumpyType):
        raise Refused("holds a NumPy number with an invalid description")
    return Array((), dtype, False, data).numpy()[()].item()


def _latin1(text, encoding) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("encodes text in an unknown way")
    return text.encode("latin1")


def _bytes(content=b"", encoding="latin1") -> bytearray:
    return bytearray(content) if isinstance(content, bytes) else bytearray(_latin1(content, encoding))


def _dict(items=()) -> dict:
    if not isinstance(items, list | tuple | dict):
        raise Refused("builds a dictionary from something else than items")
    return {as_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _set(items=()) -> set:
    if not isinstance(items, list | tuple | set | frozenset):
        raise Refused("builds a set from something else than items")
    return set(map(as_key, items))


def _of(kind: Callable, allowed: tuple[type, ...]) -> Callable:
    """`kind` called with arguments of these types only."""

    def make(*args: Any) -> Any:
        if not all(type(arg) in allowed for arg in args):
            raise Refused(f"builds a {kind.__name__} of unexpected values")
        return kind(*args)

    return make


def _size(shape=()) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise Refused("holds an invalid shape")
    return shape


def _attribute(owner, name) -> Name:
    """getattr, by which old protocols reach classes within classes: an inert name within an inert name."""
    if not isinstance(owner, Name) or not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        raise Refused("asks for an attribute of an object")
    return Name(owner.module, f"{owner.name}.{name}")


def _object(kind, base=None, state=None) -> Record:
    if not isinstance(kind, Name):
        raise Refused("builds an object of a value that is no class")
    return Record(kind)


def _table() -> dict[tuple[str, str], Any]:
    functions: dict[tuple[str, str], Callable] = {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type"): _tensor_of_class,
        ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_class,
        ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("a sparse tensor"),
        ("torch._utils", "_rebuild_sparse_csr_tensor"): _unreadable("a sparse tensor"),
        ("torch._utils", "_rebuild_qtensor"): _unreadable("quantized (codes with a scale)"),
        ("torch._utils", "_rebuild_nested_tensor"): _unreadable("a nested tensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("on the meta device: it has no numbers"),
        ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable("a tensor of a subclass"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unreadable("a tensor of another kind of device"),
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unreadable("a tensor of another kind of device"),
        ("torch", "Size"): _size,
        ("torch", "device"): _of(lambda *args: ":".join(map(str, args)), (str, int)),
        ("numpy", "dtype"): NumpyType,
        ("collections", "OrderedDict"): _dict,
        ("collections", "defaultdict"): lambda factory=None, items=(): _dict(items),
        ("_codecs", "encode"): _latin1,
    }
    for module in ("numpy.core", "numpy._core"):
        functions[f"{module}.multiarray", "scalar"] = _scalar
        functions[f"{module}.multiarray", "_reconstruct"] = lambda *args: Array()
        functions[f"{module}.numeric", "_frombuffer"] = _from_buffer
    for module in ("builtins", "__builtin__"):
        functions |= {(module, "set"): _set, (module, "frozenset"): lambda items=(): frozenset(_set(items))}
        functions |= {(module, "bytearray"): _bytes, (module, "getattr"): _attribute}
        functions |= {(module, kind.__name__): _of(kind, (int, type(None))) for kind in (slice, range)}
        functions |= {(module, "xrange"): _of(range, (int,)), (module, "complex"): _of(complex, (int, float))}
    functions |= {(module, "_reconstructor"): _object for module in ("copyreg", "copy_reg")}
    table: dict[tuple[str, str], Any] = {key: Function(".".join(key), call) for key, call in functions.items()}
    table |= {("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()}
    for module, name in itertools.product(("torch", "torch.storage"), ("UntypedStorage", "_UntypedStorage")):
        table[module, name] = StorageType(torch.uint8)
    table |= {("torch", name): dtype for name, dtype in DTYPES.items()}
    return table


TABLE = _table()
