"""EDM's and IMM's pickled networks, read without running anything in them.

Such a file is a plain pickle of "persistent objects": records of a class name, the source text of its module and the
object's `__dict__`. The usual way to open one executes that text. Here an unpickler with a list of allowed names
builds inert records, from which tensors, constructor arguments and plain attributes are taken; the source is dropped.

A pickle may also alter what it merely names (the BUILD opcode writes into `__dict__` or calls setattr), so every
allowed name stands for an object or a class that cannot be changed.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from neon_files.errors import UserError

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# Layers and configuration nodes of any version of these libraries; all of them become inert stand-ins.
_INERT_PREFIXES = ("torch.nn.modules.", "timm.", "omegaconf.")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER_DTYPE = re.compile(r"[<>=|]?([biufc]\d{1,2}|\?)")
_FORBIDDEN = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"}
_BYTE_ORDERS = ("<", ">", "=", "|")


class Refused(UserError):
    """The file names or does something that is not on the list. Its message continues "the pickle ..."."""


class _Frozen:
    """Base of everything the unpickler hands out: no `__dict__`, no `__setstate__`, no assignment."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"tries to set {name!r} of {type(self).__name__}")

    def __delattr__(self, name: str) -> None:
        raise Refused(f"tries to delete {name!r} of {type(self).__name__}")

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


class _FrozenClass(type):
    """For classes that the pickle instantiates by NEWOBJ: nothing can be assigned to the class itself."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused(f"tries to set {name!r} of class {cls.__name__}")

    def __delattr__(cls, name: str) -> None:
        raise Refused(f"tries to delete {name!r} of class {cls.__name__}")


class _Callable(_Frozen):
    """An allowed function: can be called, cannot be changed."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable):
        self._put(name=name, _function=function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Marker(_Frozen):
    """A type that omegaconf's metadata mentions; it is never called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self._put(name=name)


class _Blob(_Frozen):
    """The bytes of one nested torch.save; decoded on demand, after which the bytes are let go."""

    __slots__ = ("_data", "_decoded")

    def __init__(self, data: bytes):
        if not isinstance(data, bytes):
            raise Refused("holds a storage that is not made of bytes")
        self._put(_data=data, _decoded=None)

    def decoded(self) -> tuple[torch.UntypedStorage, torch.dtype]:
        if self._decoded is None:
            try:
                with warnings.catch_warnings():  # TypedStorage is deprecated, but it is what these files hold
                    warnings.simplefilter("ignore")
                    storage = torch.load(io.BytesIO(self._data), map_location="cpu", weights_only=True)
                    if not isinstance(storage, torch.storage.TypedStorage):
                        raise Refused(f"holds a {type(storage).__name__} where a storage of numbers was expected")
                    self._put(_decoded=(storage.untyped(), storage.dtype), _data=b"")
            except Refused:
                raise
            except Exception as error:  # of whatever damage
                raise Refused("holds a storage that is damaged or is more than numbers") from error
        return self._decoded


class LazyTensor(_Frozen):
    """A tensor of the file, decoded when `load` is called."""

    __slots__ = ("_blob", "_offset", "_size", "_stride")

    def __init__(self, blob: _Blob, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        sane = isinstance(blob, _Blob) and isinstance(size, tuple) and isinstance(stride, tuple)
        if not sane or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise Refused("holds a tensor whose description makes no sense")
        self._put(_blob=blob, _offset=offset, _size=size, _stride=stride)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._size

    def load(self) -> Tensor:
        """On the CPU, no gradient; tensors that share memory in the file share it here. Raises Refused."""
        storage, dtype = self._blob.decoded()
        available, count = storage.nbytes() // dtype.itemsize, math.prod(self._size)
        last = self._offset + sum((n - 1) * step for n, step in zip(self._size, self._stride, strict=True))
        if count > available or (count and last >= available):  # `set_` would enlarge the storage instead
            raise Refused("holds a tensor that reaches beyond its storage")
        return torch.empty(0, dtype=dtype).set_(storage, self._offset, self._size, self._stride)


class _Dtype(_Frozen):
    """np.dtype by its code, numbers only. BUILD sets the byte order of this record, never that of NumPy's object."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not _NUMBER_DTYPE.fullmatch(code):
            raise Refused(f"names the NumPy type {code!r}, which is no plain number")
        self._put(code=code, order="")

    def __setstate__(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) >= 2 and state[1] in _BYTE_ORDERS
        if not plain or any(type(x) not in (int, type(None)) for x in (state[0], *state[2:])):
            raise Refused("changes a NumPy type in an unknown way")
        self._put(order=state[1])

    def numpy(self) -> np.dtype:
        try:
            return np.dtype(self.order.replace("|", "") + self.code.lstrip("<>=|"))
        except TypeError as error:
            raise Refused(f"names the NumPy type {self.code!r}, which does not exist") from error


class _Record(_Frozen):
    """A persistent object: class name and `__dict__`. The source text is not kept."""

    __slots__ = ("class_name", "state")

    def __init__(self, meta: Any):
        if not isinstance(meta, dict) or meta.get("type") != "class" or type(meta.get("type")) is not str:
            raise Refused("holds a persistent object that is not of type 'class'")
        if type(meta.get("version")) is not int or meta["version"] != 6:
            raise Refused(f"holds a persistent object of version {meta.get('version')!r}; version 6 is known")
        class_name, state = meta.get("class_name"), meta.get("state")
        if not isinstance(class_name, str) or not isinstance(state, dict | None):
            raise Refused("holds a persistent object without class name or state")
        self._put(class_name=class_name, state={} if state is None else state)


class _Inert(_Frozen, metaclass=_FrozenClass):
    """Stand-in for an instance of a library class: takes any arguments, keeps what BUILD hands over, does nothing."""

    __slots__ = ("args", "state")
    origin = ("", "")

    def __new__(cls, *args: Any, **kwargs: Any):
        self = object.__new__(cls)
        self._put(args=args, state=None)
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self._put(state=state)


class _EasyDict(dict, metaclass=_FrozenClass):
    """EDM's dictionary with attribute access, as a dictionary."""

    __slots__ = ()


@cache
def _inert_class(module: str, name: str) -> type:
    return _FrozenClass(name, (_Inert,), {"__slots__": (), "origin": (module, name)})


def _tensor(blob, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> LazyTensor:
    return LazyTensor(blob, offset, size, stride)


def _parameter(tensor, requires_grad=False, hooks=None) -> LazyTensor:
    if not isinstance(tensor, LazyTensor):
        raise Refused("holds a parameter that is no tensor")
    return tensor


def _scalar(dtype, data=b"") -> bool | int | float | complex:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != dtype.numpy().itemsize:
        raise Refused("holds a NumPy number whose description makes no sense")
    return np.frombuffer(data, dtype.numpy())[0].item()


def _latin1(text, encoding) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes text as {encoding!r}")
    return text.encode("latin1")


def _plain_dict(items=()) -> dict:
    if not isinstance(items, list | tuple | dict):
        raise Refused("builds a dictionary from something else than items")
    return dict(items)


def _allowed() -> dict[tuple[str, str], Any]:
    functions = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Record,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch.storage", "_load_from_bytes"): _Blob,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy", "dtype"): _Dtype,
        ("collections", "OrderedDict"): _plain_dict,
        ("collections", "defaultdict"): lambda factory=None, items=(): _plain_dict(items),
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("_codecs", "encode"): _latin1,
    }
    table: dict[tuple[str, str], Any] = {key: _Callable(".".join(key), f) for key, f in functions.items()}
    table["dnnlib.util", "EasyDict"] = _EasyDict
    table |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
    table["typing", "Any"] = _Marker("typing.Any")
    types = ("dict", "list", "tuple", "int", "float", "str", "bool")
    table |= {(module, name): _Marker(name) for module in ("builtins", "__builtin__") for name in types}
    return table


_ALLOWED = _allowed()


class _Rules:
    """The two hooks of an unpickler. Extension codes are refused by find_class not knowing what they stand for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (
            module.startswith(_INERT_PREFIXES)
            and _IDENTIFIER.fullmatch(name)
            and module.replace(".", "").isidentifier()
        ):
            return _inert_class(module, name)
        raise Refused(f"names {module}.{name}, which is not on the list of harmless names")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("refers to objects outside the file")

    def get_extension(self, code: int) -> Any:  # the pure Python unpickler; the C one asks copyreg, then find_class
        raise Refused("uses an extension code")


class _Unpickler(_Rules, pickle.Unpickler):
    pass


class _PurePythonUnpickler(_Rules, pickle._Unpickler):
    """The same rules in the slower implementation, for tests."""


@dataclass(frozen=True)
class PickledObject:
    """One object of the file: what it was made from and what it holds."""

    class_name: str
    init_args: list[Any]  # plain values; [] where the file records none
    init_kwargs: dict[str, Any]
    attributes: dict[str, Any]  # its own plain attributes, module internals left out
    tensors: dict[str, LazyTensor] = field(default_factory=dict)  # its own parameters, then persistent buffers
    children: dict[str, PickledObject] = field(default_factory=dict)  # submodules

    def lazy_state(self, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) in the order of `state_dict()`."""
        for name, tensor in self.tensors.items():
            yield prefix + name, tensor
        for name, child in self.children.items():
            yield from child.lazy_state(f"{prefix}{name}.")

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.load() for name, tensor in self.lazy_state()}


def read_pickle(path: str | Path, pure_python: bool = False) -> dict[str, Any]:
    """Top-level entries of a pickled snapshot: a PickledObject per network, loss or augmentation, plain values else.

    Raises UserError for anything but such a file. Nothing in the file is executed or imported.
    """
    path = Path(path)
    with open(path, "rb") as file:
        return unpickle(file, path, pure_python)


def unpickle(file: BinaryIO, path: str | Path, pure_python: bool = False) -> dict[str, Any]:
    """`read_pickle` of an open file; `path` is for messages."""
    try:
        _check_opcodes(file)
        top = (_PurePythonUnpickler if pure_python else _Unpickler)(file).load()
        if not isinstance(top, dict) or not all(isinstance(name, str) for name in top):
            raise Refused("is not a dictionary of named entries")
        return {name: _convert(value) for name, value in dict.items(top)}
    except Refused as error:
        raise refusal(path, error) from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cut short or damaged; download it again") from error
    except Exception as error:  # opcodes applied to what they do not fit: the file's doing, whatever Python calls it
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: refused, not a well-formed snapshot ({what})") from error


def _check_opcodes(file: BinaryIO) -> None:
    """Refuse, before anything is built, what no pickler writes: memo numbers far beyond those in use.

    They make the unpickler reserve a table of that size: one flipped bit can ask for many gigabytes.
    """
    start = file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
                raise Refused(f"numbers its {count}th object {argument}; it is damaged or malicious")
            if opcode.name in _FORBIDDEN:
                raise Refused(f"uses the opcode {opcode.name}")
    except (ValueError, MemoryError) as error:
        raise EOFError from error
    file.seek(start)


def refusal(path: str | Path, error: Refused) -> UserError:
    """The message for the user."""
    return UserError(f"{path}: refused, nothing in it was run: the pickle {error.message}")


def _convert(value: Any) -> Any:
    return _module(value) if isinstance(value, _Record) else plain(value)


def _module(node: Any) -> PickledObject:
    """Of a persistent object, or of a library module inside one."""
    if isinstance(node, _Inert):
        state, class_name = ({} if node.state is None else node.state), node.origin[1]
    else:
        state, class_name = node.state, node.class_name
    if not isinstance(state, dict):
        raise Refused(f"holds a {class_name} whose state is no dictionary")
    transient = state.get("_non_persistent_buffers_set") or ()
    tensors: dict[str, LazyTensor] = {}
    for table, skipped in (("_parameters", ()), ("_buffers", transient)):
        for name, value in (state.get(table) or {}).items():
            if value is None or name in skipped:
                continue
            if not isinstance(value, LazyTensor):
                raise Refused(f"holds {name!r} of {class_name} that is no tensor")
            tensors[name] = value
    children = {}
    for name, value in (state.get("_modules") or {}).items():
        if value is None:
            continue
        if not isinstance(value, _Record | _Inert):
            raise Refused(f"holds {name!r} of {class_name} that is no module")
        children[name] = _module(value)
    attributes = {}
    for name, value in state.items():
        if not name.startswith("_") and name != "training":  # torch's own entries, whose set varies by version
            if isinstance(value, _Callable):
                raise Refused(f"keeps a reference to {value.name} in {name!r} of {class_name}")
            try:
                attributes[name] = plain(value)
            except Refused:  # a layer's own objects (activation functions, formats, ...) are of no interest
                continue
    args, kwargs = plain(state.get("_init_args") or []), plain(state.get("_init_kwargs") or {})
    return PickledObject(class_name, args, kwargs, attributes, tensors, children)


def plain(value: Any) -> Any:
    """Lists, dicts, sets, text and numbers; omegaconf's lists and dicts and tuples become plain ones, dtypes text.

    Raises Refused for everything else, so that no stand-in leaves this module.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, set):
        return {plain(x) for x in value}
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in dict.items(value)}
    if isinstance(value, LazyTensor):
        return value.load()
    if isinstance(value, _Inert) and value.origin[0].startswith("omegaconf.") and isinstance(value.state, dict):
        return plain(value.state["_content" if "_content" in value.state else "_val"])
    raise Refused(f"holds a {_describe(value)} where plain data were expected")


def _describe(value: Any) -> str:
    if isinstance(value, _Inert):
        return ".".join(value.origin)
    if isinstance(value, _Callable | _Marker):
        return f"reference to {value.name}"
    return getattr(value, "__name__", type(value).__name__)
