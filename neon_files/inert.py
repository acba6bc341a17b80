"""Pickles as inert trees: nothing that a file names is imported, called or changed.

Opening a pickle the usual way runs it. Here its opcodes are followed by hand: lists, dicts, tuples, text and numbers
become themselves, names become `Name`, objects built from them become a `Record`. A table given by the caller
turns tensors and NumPy numbers into values of this package. The work is bounded in advance.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from neon_files.guard import Refused

MAX_STEPS = 2_000_000  # opcodes and copied items; a network of 2.3 billion parameters takes some 20 thousand
MAX_NODES = 300_000  # values of one file after shared ones have been written out
_MAX_LINE = 1 << 16  # bytes of one line of a text opcode
_MAX_NAME = 300  # characters of a module's or a class's name
_MAX_KEY = 64  # values within one key
_MAX_BITS = 4096  # of a whole number; random generators keep some of 128

_TOO_LONG = f"takes more than {MAX_STEPS:,} steps to read"

# Names of the standard library, NumPy and torch that checkpoints hold beside their weights. All stay inert; the list
# exists so that a file that asks for anything else of them is refused rather than half read.
_HARMLESS = {
    "argparse": {"Namespace"},
    "_io": {"BytesIO"},
    "builtins": {"object", "dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "type", "Ellipsis"},
    "collections": {"Counter", "deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "enum": {"Enum", "IntEnum", "Flag", "IntFlag", "StrEnum"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "logging": {"Logger", "getLogger"},
    "random": {"Random"},
    "re": {"_compile"},
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID", "SafeUUID"},
    "zoneinfo": {"ZoneInfo._unpickle"},
    "numpy": {"ndarray", "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool_", "bool"},
    "torch": {"Tensor", "Generator", "strided", "per_tensor_affine", "per_channel_affine", "contiguous_format"},
    "torch.serialization": {"_get_layout"},
}
_HARMLESS["__builtin__"] = _HARMLESS["builtins"] | {"long", "unicode"}  # protocols 0 to 2 use Python 2's names
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
_HARMLESS |= {"pathlib": _PATHS, "pathlib._local": _PATHS}
# Whole packages: layers and their functions, optimizers, scalers, distributed metadata, random generators.
_INERT_PREFIXES = (
    *("torch.nn.modules.", "torch.nn.parameter", "torch.nn.functional", "torch._C._nn", "torch.optim.", "torch.amp."),
    *("torch.cuda.amp.", "torch.ao.", "torch.distributed.", "torch.utils.data.", "numpy.random."),
)
# Everything else in these is refused by name. Any other module is user code: inert, like the rest.
_GUARDED = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "torch", "numpy"}


class Name:
    """A class or function that the file names. It is never looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Function:
    """An entry of the caller's table: called with the pickle's arguments, which it must check."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable):
        self.name, self.call = name, call

    def __str__(self) -> str:
        return self.name


class Record:
    """An object of the file: the name of its constructor, the arguments, and the state and items set afterwards."""

    __slots__ = ("args", "items", "origin", "pairs", "state")

    def __init__(self, origin: Name, args: tuple = ()):
        self.origin, self.args = origin, args
        self.state: Any = None
        self.items: list[Any] = []  # of list-like ones
        self.pairs: list[tuple[Any, Any]] = []  # of dict-like ones

    def build(self, state: Any) -> None:
        if self.state is not None:
            raise Refused(f"sets the state of a {self.origin} twice")
        self.state = state


class _Bounded:
    """A file whose reads are compared with its remaining length before memory is reserved for them."""

    def __init__(self, file: BinaryIO):
        start = file.tell()
        self.size = file.seek(0, 2)
        file.seek(start)
        self._file, self.tell = file, file.tell

    def read(self, count: int) -> bytes:
        if count > 4096 and count > self.size - self.tell():
            raise EOFError("ends within a value")
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(_MAX_LINE)
        if len(line) == _MAX_LINE:
            raise Refused(f"holds a line of more than {_MAX_LINE} bytes")
        return line


class InertUnpickler:
    """Reads pickles from `file`, one a `load()`. Raises Refused; on damage, any of Python's errors.

    `table` maps (module, name) to the value that stands for it, a Function mostly; objects that the table's functions
    return take part in BUILD where they have a method `build(state)`. `persistent` resolves references to data outside
    of the pickle.
    """

    def __init__(self, file: BinaryIO, table: Mapping[tuple[str, str], Any], persistent: Callable | None = None):
        self._file, self._table, self._persistent = _Bounded(file), table, persistent
        self._steps = self._copied = 0

    def load(self) -> Any:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(self._file):  # type: ignore[arg-type]  # it reads, readlines, tells
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise Refused(_TOO_LONG)
            if opcode.name in _CONSTANTS:
                if type(argument) is int and argument.bit_length() > _MAX_BITS:
                    raise Refused(f"holds a number of {argument.bit_length()} bits")
                self._stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise Refused(f"uses the opcode {opcode.name}")
        return self._stack.pop()

    def _charge(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise Refused(_TOO_LONG)

    def _marked(self) -> list[Any]:
        """The values pushed since the last mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _tuple(self, size: int) -> None:
        items = tuple(self._stack[len(self._stack) - size :])
        if len(items) != size:
            raise EOFError("takes more from the stack than there is")
        del self._stack[len(self._stack) - size :]
        self._stack.append(items)

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("names an object by a value that is not text")
        if (module, name) in self._table:
            self._stack.append(self._table[module, name])
        elif _stays_inert(module, name):
            self._stack.append(Name(module, name))
        else:
            raise Refused(f"names {module[:80]}.{name[:80]}, which is not on the list of harmless names")

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _make(self, function: Any, args: Any, kwargs: Any = None) -> None:
        if not isinstance(args, tuple):
            raise Refused("calls a function with arguments that are no tuple")
        if isinstance(function, Function):
            if kwargs:
                raise Refused(f"calls {function} with named arguments")
            for argument in args:
                if isinstance(argument, str | bytes | bytearray):
                    self._copied += len(argument)
                elif isinstance(argument, list | tuple | dict | set | frozenset):
                    self._charge(len(argument))
            if self._copied > 2 * self._file.size + (1 << 20):
                raise Refused("copies more text than the file holds")
            self._stack.append(function.call(*args))
        elif isinstance(function, Name):
            self._stack.append(Record(function, (*args, kwargs) if kwargs else args))
        else:
            raise Refused(f"calls a {type(function).__name__}")

    def _reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._make(function, args)

    def _newobj_ex(self, _: Any) -> None:
        kwargs, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._make(function, args, kwargs)

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, dict):
            return  # attributes of an OrderedDict: torch's versions of the modules
        if isinstance(target, Name | Function) or not hasattr(target, "build"):
            kind = target if isinstance(target, Name | Function) else type(target).__name__
            raise Refused(f"tries to change {kind}")
        target.build(state)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            raise Refused(f"appends to a {type(target).__name__}")

    def _update(self, items: list[Any]) -> None:
        target, pairs = self._stack[-1], list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, dict):
            target.update((as_key(key), value) for key, value in pairs)
        elif isinstance(target, Record):
            target.pairs.extend(pairs)
        else:
            raise Refused(f"sets items of a {type(target).__name__}")

    def _add(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], set):
            raise Refused(f"adds to a {type(self._stack[-1]).__name__}")
        self._stack[-1].update(map(as_key, items))

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self._stack.append({})
        self._update(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _persistent_id(self, _: Any) -> None:
        if self._persistent is None:
            raise Refused("refers to objects outside the file")
        self._stack.append(self._persistent(self._stack.pop()))


def _stays_inert(module: str, name: str) -> bool:
    if len(module) > _MAX_NAME or len(name) > _MAX_NAME:
        return False
    if name in _HARMLESS.get(module, ()):
        return True
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        return False
    if module.startswith(_INERT_PREFIXES):
        return name.isidentifier()
    return module.partition(".")[0] not in _GUARDED and not any(part.startswith("__") for part in name.split("."))


def as_key(value: Any) -> Any:
    """`value`, if it may be a key or a member of a set: hashing it must be cheap. Raises Refused."""
    left, count = [value], 0
    while left:
        part = left.pop()
        count += 1
        if count > _MAX_KEY or (isinstance(part, tuple) and len(part) > _MAX_KEY):
            raise Refused(f"uses a key of more than {_MAX_KEY} values")
        if isinstance(part, tuple):
            left.extend(part)
        elif not _is_plain_key(part):
            raise Refused(f"uses a key of the type {type(part).__name__}, or a very large one")
    return value


def _is_plain_key(value: Any) -> bool:
    if type(value) is int:  # larger ones can be chosen to collide
        return value.bit_length() <= 64
    # The rest is hashed by identity: names, records, dtypes, tensors.
    plain = value is None or isinstance(value, bool | float | complex | str | bytes)
    return plain or type(value).__hash__ is object.__hash__ or type(value).__module__ == "torch"


_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _push(make: Callable[[], Any]) -> Callable:
    return lambda self, _: self._stack.append(make())


def _remember(self: InertUnpickler, index: Any) -> None:
    self._memo[index] = self._stack[-1]


def _recall(self: InertUnpickler, index: int) -> None:
    self._stack.append(self._memo[index])


_STEPS: dict[str, Callable[[InertUnpickler, Any], object]] = {
    **{name: lambda self, _: None for name in ("PROTO", "FRAME", "STOP")},
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(set),
    "EMPTY_TUPLE": _push(tuple),
    "MARK": lambda self, _: self._marks.append(len(self._stack)),
    "POP": InertUnpickler._pop,
    "POP_MARK": lambda self, _: self._marked(),
    "DUP": lambda self, _: self._stack.append(self._stack[-1]),
    "MEMOIZE": lambda self, _: _remember(self, len(self._memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
    "LIST": lambda self, _: self._stack.append(self._marked()),
    "TUPLE": lambda self, _: self._stack.append(tuple(self._marked())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "DICT": InertUnpickler._dict,
    "FROZENSET": lambda self, _: self._stack.append(frozenset(map(as_key, self._marked()))),
    "APPEND": lambda self, _: self._extend([self._stack.pop()]),
    "APPENDS": lambda self, _: self._extend(self._marked()),
    "SETITEM": InertUnpickler._set_item,
    "SETITEMS": lambda self, _: self._update(self._marked()),
    "ADDITEMS": lambda self, _: self._add(self._marked()),
    "GLOBAL": lambda self, argument: self._name(*argument.split(" ", 1)),
    "STACK_GLOBAL": InertUnpickler._stack_global,
    "REDUCE": InertUnpickler._reduce,
    "NEWOBJ": InertUnpickler._reduce,
    "NEWOBJ_EX": InertUnpickler._newobj_ex,
    "BUILD": InertUnpickler._build,
    "BINPERSID": InertUnpickler._persistent_id,
}
