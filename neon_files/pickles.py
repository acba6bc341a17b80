"""EDM's and IMM's pickled networks, read without executing anything.

Such a file is a plain pickle of "persistent objects": records of a class name, the source text of its module and the
object's `__dict__`. The usual way to open one executes that text. Here the inert reader builds records, from which
tensors, constructor arguments and plain attributes are taken; the source is dropped.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from neon_files.guard import Refused, reading
from neon_files.inert import MAX_NODES, Function, InertUnpickler, Name, Record
from neon_files.lazy_tensor import TABLE, Array, LazyTensor, NumpyType, Storage, StorageType, Unreadable
from neon_files.torch_file import read_legacy

_PATHS = ("pathlib.", "pathlib._local.")
_TEXT = 100  # characters that count as a value
_TENSOR = 30  # values whose conversion takes as long as a tensor's


class _Blob:
    """The bytes of one nested torch.save; decoded on demand, which frees these bytes."""

    __slots__ = ("_data", "_storage")

    def __init__(self, data: Any):
        if not isinstance(data, bytes):
            raise Refused("holds a storage whose content is not bytes")
        self._data = data
        self._storage: Storage | None = None

    def resolved(self) -> Storage:
        if self._storage is None:
            try:
                storage = read_legacy(io.BytesIO(self._data))
            except Exception as error:  # of whatever damage
                raise Refused("holds a storage that is damaged or is more than numbers") from error
            if not isinstance(storage, Storage):
                raise Refused(f"holds a {type(storage).__name__} where a storage of numbers was expected")
            self._storage, self._data = storage, b""
        return self._storage


class _Persistent:
    """A persistent object: class name and `__dict__`. The source text is not kept."""

    __slots__ = ("class_name", "state")

    def __init__(self, meta: Any):
        if not isinstance(meta, dict) or meta.get("type") != "class" or type(meta.get("type")) is not str:
            raise Refused("holds a persistent object that is not of type 'class'")
        if type(meta.get("version")) is not int or meta["version"] != 6:
            raise Refused(f"holds a persistent object of version {_short(meta.get('version'))}; version 6 is read")
        class_name, state = meta.get("class_name"), meta.get("state")
        if not isinstance(class_name, str) or not isinstance(state, dict | None):
            raise Refused("holds a persistent object without class name or state")
        self.class_name, self.state = class_name, {} if state is None else state


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str | int | float | None) else type(value).__name__


def _attribute_dict(*args: Any) -> dict:
    return {}  # filled by SETITEMS


_TABLE = TABLE | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function("_reconstruct_persistent_obj", _Persistent),
    ("torch.storage", "_load_from_bytes"): Function("torch.storage._load_from_bytes", _Blob),
    ("dnnlib.util", "EasyDict"): Function("dnnlib.util.EasyDict", _attribute_dict),
}


@dataclass(frozen=True)
class PickledObject:
    """One object of the file: its constructor arguments and its content."""

    class_name: str
    init_args: list[Any]  # plain values; [] where the file records none
    init_kwargs: dict[str, Any]
    attributes: dict[str, Any]  # plain attributes, without module internals
    tensors: dict[str, LazyTensor] = field(
        default_factory=dict
    )  # parameters, then persistent buffers, without submodules
    children: dict[str, PickledObject] = field(default_factory=dict)  # submodules

    def lazy_state(self, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) in the order of `state_dict()`."""
        for name, tensor in self.tensors.items():
            yield prefix + name, tensor
        for name, child in self.children.items():
            yield from child.lazy_state(f"{prefix}{name}.")

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.load() for name, tensor in self.lazy_state()}


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Top-level entries of a pickled snapshot: a PickledObject per network, loss or augmentation, plain values else.

    Objects of other classes beside the networks become the text "<class>". Raises UserError
    for anything but such a file. Nothing in the file is executed or imported.
    """
    with open(path, "rb") as file:
        return unpickle(file, path)


def unpickle(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    """`read_pickle` of an open file; `path` is for messages."""
    with reading(path):
        top = InertUnpickler(file, _TABLE).load()
        if not isinstance(top, dict) or not all(isinstance(name, str) for name in top):
            raise Refused("is not a dictionary of named entries")
        convert = _Converter()
        entries = {name: convert.entry(value) for name, value in top.items()}
        if not any(isinstance(value, PickledObject) for value in entries.values()):
            raise Refused(f"holds no network, but {', '.join(list(entries)[:5]) or 'nothing'}")
        return entries


class _Converter:
    """Inert values of one file as plain ones. Shared values are written out, so their number is bounded."""

    def __init__(self):
        self._left = MAX_NODES

    def _count(self, values: int = 1) -> None:
        self._left -= values
        if self._left < 0:
            raise Refused(f"stands for more than {MAX_NODES:,} values")

    def entry(self, value: Any) -> Any:
        return self.module(value) if isinstance(value, _Persistent) else self.plain(value, other=_described)

    def module(self, node: _Persistent | Record) -> PickledObject:
        """Of a persistent object, or of a library module inside one."""
        self._count()
        if isinstance(node, Record):
            state, class_name = ({} if node.state is None else node.state), node.origin.name
        else:
            state, class_name = node.state, node.class_name
        if not isinstance(state, dict):
            raise Refused(f"holds a {class_name} whose state is no dictionary")
        transient = set(state.get("_non_persistent_buffers_set") or ())
        tables = [state.get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
        self._count(sum(map(len, (state, transient, *tables))))
        tensors: dict[str, LazyTensor] = {}
        for table, skipped in (("_parameters", ()), ("_buffers", transient)):
            for name, value in (state.get(table) or {}).items():
                if value is None or name in skipped:
                    continue
                if isinstance(value, Unreadable):
                    raise Refused(f"holds {name!r} of {class_name}, which is {value.reason}")
                if not isinstance(value, LazyTensor):
                    raise Refused(f"holds {name!r} of {class_name} that is no tensor")
                tensors[name] = value
        children = {}
        for name, value in (state.get("_modules") or {}).items():
            if value is None:
                continue
            if not isinstance(value, _Persistent | Record):
                raise Refused(f"holds {name!r} of {class_name} that is no module")
            children[name] = self.module(value)
        args, kwargs = (
            self.plain(state.get(key) or empty) for key, empty in (("_init_args", []), ("_init_kwargs", {}))
        )
        return PickledObject(class_name, args, kwargs, self._attributes(state, class_name), tensors, children)

    def _attributes(self, state: dict, class_name: str) -> dict[str, Any]:
        attributes = {}
        for name, value in state.items():
            if not name.startswith("_") and name != "training":  # torch's entries, which vary by version
                if isinstance(value, Function):
                    raise Refused(f"keeps a reference to {value} in {name!r} of {class_name}")
                try:
                    attributes[name] = self.plain(value)
                except Refused:  # objects of a layer (activation functions, formats, ...) are not needed
                    if self._left < 0:
                        raise
        return attributes

    def plain(self, value: Any, other: Any = None) -> Any:
        """Lists, dicts, sets, text, numbers, ranges and arrays; omegaconf's lists and dicts, and tuples, become plain
        ones; dtypes, devices and paths text.

        Everything else is given to `other`, or Refused is raised: no stand-in leaves this module.
        """
        self._count()
        if isinstance(value, str | bytes | bytearray):
            self._count(len(value) // _TEXT)
            return value
        if value is None or isinstance(value, bool | int | float | complex | slice | range):
            return value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, list | tuple):
            return [self.plain(x, other) for x in value]
        if isinstance(value, set | frozenset):
            return {_hashable(self.plain(x, other)) for x in value}
        if isinstance(value, dict):
            return {_hashable(self.plain(k, other)): self.plain(v, other) for k, v in value.items()}
        if isinstance(value, LazyTensor):
            self._count(_TENSOR)
            return value.load()
        if isinstance(value, Record):
            origin = str(value.origin)
            if origin.startswith("omegaconf.") and isinstance(value.state, dict):
                return self.plain(value.state["_content" if "_content" in value.state else "_val"], other)
            if origin.startswith(_PATHS) and all(isinstance(part, str) for part in value.args):
                self._count(sum(map(len, value.args)) // _TEXT)
                return "/".join(value.args).replace("//", "/")
        try:
            if isinstance(value, Array):
                return value.numpy()
        except Refused:
            if other is None:
                raise
        if other is None:
            raise Refused(f"holds {_described(value)} where plain data were expected")
        return other(value)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _described(value: Any) -> str:
    if isinstance(value, Record):
        return f"<{value.origin}>"
    if isinstance(value, Name | Function):
        return f"<reference to {value}>"
    names = {Array: "numpy.ndarray", NumpyType: "numpy.dtype", StorageType: "storage type", Storage: "storage"}
    return f"<{names.get(type(value), type(value).__name__)}>"
