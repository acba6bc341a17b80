"""Weight files, recognised by their content, not by their name.

`open_weights` reads the published containers (torch zip and legacy, pickled networks, safetensors, folders of
distributed checkpoints) and the ways in which training scripts nest a state dict, and loads tensors one at a time.
Nothing in a file is executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_files.atomic import sha256_file
from neon_files.distributed_checkpoint import is_distributed, read_distributed, sha256_distributed
from neon_files.errors import UserError
from neon_files.guard import AGAIN, Unfit, reading
from neon_files.inert import Record
from neon_files.kinds import stand_in
from neon_files.lazy_tensor import LazyTensor, Unreadable
from neon_files.names import match_names, unwrapped, without_counter
from neon_files.pickles import PickledObject, read_pickle
from neon_files.safetensors_file import open_tensors
from neon_files.torch_file import LEGACY_START, read_torch

# Entries under which scripts keep a state dict, the preferred first: published weights are averaged ones.
_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict")
_RAW = (
    "trainer",
    "var_wo_ddp",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|(^|_)opt(_|$)", re.IGNORECASE)
_OTHERS = {  # first bytes, or those at offset 257, of files that are no weights but kept beside or around them
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"ustar": "a tar archive",
}
_DEEPEST = 20  # dots in the way to a state dict; names of entries may have some
_TOP = "."  # the entry that is the file itself


@dataclass
class Weights:
    """An opened weight file. `loaders[name]()` gives one tensor on the CPU, in the order of the state dict."""

    path: Path
    container: str  # torch | torch-legacy | pickle | safetensors | distributed
    tensors: dict[str, LazyTensor]  # described, not read
    config: dict[str, Any] | None = None  # {"class": ..., "args": [...], "kwargs": {...}}: its constructor
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # choices to report to the user
    loaders: dict[str, Callable[[], Tensor]] = field(init=False)

    def __post_init__(self):
        self.loaders = {name: self._loader(name, tensor) for name, tensor in self.tensors.items()}

    def _loader(self, name: str, tensor: LazyTensor) -> Callable[[], Tensor]:
        def load() -> Tensor:
            with reading(f"{self.path}: {name}"):
                return tensor.load()

        return load

    def named_like(self, names: Iterable[str]) -> Weights:
        """The same weights, under those of `names` that differ only by the parts that wrappers add."""
        with reading(self.path):
            pairs = match_names(names, self.tensors)
        return replace(self, tensors={pairs[name]: tensor for name, tensor in self.tensors.items()})

    def sha256(self) -> str:
        return sha256_distributed(self.path) if self.container == "distributed" else sha256_file(self.path)

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor; reads no tensor data."""
        with reading(self.path):
            return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}


def open_weights(path: str | Path, entry: str | None = None) -> Weights:
    """The weights in `path`, a file or the folder of a distributed checkpoint.

    `entry` names the state dict to take where there are several ("model", "ema", ...); entries within entries are
    joined by dots ("trainer.ema"), "." is the file itself. Raises UserError for a file that is empty, cut short,
    something else, or not a state dict.
    """
    path = Path(path)
    if is_distributed(path):
        with reading(path):
            return _chosen(path, "distributed", read_distributed(path), entry)
    if path.suffix == ".distcp":
        raise UserError(f"{path}: is a part of a distributed checkpoint; name its folder")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise UserError(f"{path}: is empty; {AGAIN}")
    with reading(path):
        if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and LEGACY_START in start[:32]):
            is_zip = start.startswith(b"PK")
            return _chosen(path, "torch" if is_zip else "torch-legacy", read_torch(path, is_zip), entry)
        if start[8:9] == b"{" and not stand_in(start):
            return _open_safetensors(path)
        if (start[:1] == b"\x80" and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])) or start[:1] in b"(]}":
            return _open_pickle(path, entry)
        raise Unfit(_foreign(start))


def _foreign(start: bytes) -> str:
    if stand_in(start):
        return f"{stand_in(start)}; {AGAIN}"
    for magic, kind in _OTHERS.items():
        if start.startswith(magic) or start[257:].startswith(magic):
            return f"is {kind}, not weights that can be read; unpack or convert it"
    if not start.strip(b"\0"):
        return f"begins with zeros: an unfinished download; {AGAIN}"
    return "is not a recognised weight file (torch, safetensors, or a pickled network)"


def _chosen(path: Path, container: str, content: Any, entry: str | None) -> Weights:
    choice = _Choice()
    state = choice.state_dict(content, entry)
    state = unwrapped(without_counter(state))
    return Weights(path, container, state, metadata=choice.metadata, notes=choice.notes)


@dataclass
class _Choice:
    """Finds the state dict in a file's content. Small plain values beside it go to `metadata`."""

    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _parted: bool = False  # written by DeepSpeed, which may keep the numbers in other files
    _room: int = 1 << 20  # characters of metadata
    _contains: dict[int, bool] = field(default_factory=dict, repr=False)  # id of a value -> whether it contains tensors

    def state_dict(self, content: Any, entry: str | None = None, trail: str = "") -> dict[str, LazyTensor]:
        where = f"its entry {trail.rstrip('.')!r}" if trail else "it"
        if trail.count(".") > _DEEPEST:
            raise Unfit(f"{where[:100]} lies too deep for a state dict")
        if not isinstance(content, dict):
            raise Unfit(f"{where} {_kind(content)}; save a plain state dict instead")
        if entry == _TOP:
            return self._tensors(content, where)
        if entry is not None:
            first, _, rest = (entry, "", "") if entry in content else entry.partition(".")
            if first not in content:
                raise Unfit(f"has no entry {trail + entry!r}; it has {_some(content)}")
            return self.state_dict(content[first], rest or None, f"{trail}{first}.")
        self._keep_plain(content)
        self._parted |= any(str(name).startswith("ds_") for name in content)
        selected = self._selected(content, trail)
        if selected is not None:
            return self.state_dict(content[selected], None, f"{trail}{selected}.")
        return self._tensors(content, where)

    def _keep_plain(self, content: dict) -> None:
        for name, value in content.items():
            if value is None or isinstance(value, str | bool | int | float):
                self._room -= len(str(name)) + len(str(value))
                if self._room < 0:
                    return
                self.metadata[str(name)] = value

    def _selected(self, content: dict, trail: str) -> str | None:
        """The entry that holds the weights; None: `content` itself. Adds a note where several would fit."""
        nests = [name for name, value in content.items() if isinstance(name, str) and self._is_nest(name, value)]
        averaged, raw = _weight_entries(nests)
        direct = any(isinstance(value, LazyTensor | Unreadable) for value in content.values())
        if not averaged and not raw:
            if direct and nests:
                raise Unfit(
                    f"tensors both directly and in {_some(nests)}, which is ambiguous; "
                    f"neon merge: --entry {trail}{nests[0]} takes those, --entry {_TOP} the direct ones"
                )
            if len(nests) > 1:
                raise Unfit(f"holds several sets of weights ({_some(nests)}); choose with --entry {trail}{nests[0]}")
            return nests[0] if nests else None
        beside = [*(name for name in nests if name not in (*averaged, *raw)), *([_TOP] if direct else [])]
        fitting = [*averaged, *raw, *(beside if averaged else [])]
        self.notes += _selection_notes([name if name == _TOP else trail + name for name in fitting])
        return fitting[0]

    def _is_nest(self, name: str, value: Any) -> bool:
        if _NO_WEIGHTS.search(name) or not isinstance(value, dict):
            return False
        return self._holds_tensors(value) or (name in (*_AVERAGED, *_RAW) and not value)

    def _holds_tensors(self, value: Any) -> bool:
        """Within lists and dicts too; each is looked at once, however often it is referred to."""
        if isinstance(value, LazyTensor | Unreadable):
            return True
        if not isinstance(value, dict | list | tuple):
            return False
        if id(value) not in self._contains:
            self._contains[id(value)] = False  # should it hold itself
            inner = value.values() if isinstance(value, dict) else value
            self._contains[id(value)] = any(self._holds_tensors(v) for v in inner)
        return self._contains[id(value)]

    def _tensors(self, content: dict, where: str) -> dict[str, LazyTensor]:
        for name, value in content.items():
            if isinstance(value, Unreadable):
                raise Unfit(f"{name} is {value.reason}; save it as an ordinary tensor")
            if isinstance(value, Record) and re.search(r"Tensor|Parameter|Params", value.origin.name):
                raise Unfit(f"{name} is a {value.origin}, whose numbers cannot be read; save it as an ordinary tensor")
        state = {name: value for name, value in content.items() if isinstance(value, LazyTensor)}
        if {"ema_model", "online_model"} <= {str(name).partition(".")[0] for name in state}:  # ema-pytorch
            self.notes.append("takes the averaged weights 'ema_model.', not 'online_model.'")
            names = [name for name in state if name.startswith("ema_model.")]
            state = {name.removeprefix("ema_model."): state[name] for name in names}
        empty = next((name for name, value in state.items() if 0 in value.shape), None)
        if self._parted and empty is not None:
            raise Unfit(f"{empty} is empty: DeepSpeed keeps its numbers in other files; join them with zero_to_fp32.py")
        if not state or not all(isinstance(name, str) for name in state):
            lists = [
                str(name) for name, value in content.items() if isinstance(value, list) and self._holds_tensors(value)
            ]
            if lists:
                raise Unfit(f"{where} holds tensors without names ({_some(lists)}); choose another one with --entry")
            objects = [f"{name} {_kind(value)}" for name, value in content.items() if isinstance(value, Record)]
            if objects:
                raise Unfit(
                    f"no weights found; nothing in it was run: {_some(objects)}; save a plain state dict instead"
                )
            raise Unfit(f"no weights found; {where} has {_some(content)}")
        return state


def _kind(value: Any) -> str:
    if isinstance(value, Record):
        return f"is a pickled {value.origin}"
    return f"holds a {'Tensor' if isinstance(value, LazyTensor) else type(value).__name__}, not a state dict"


def _weight_entries(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Those of averaged weights and those of raw ones, the preferred first."""
    averaged = sorted(filter(_is_averaged, names), key=lambda name: name not in _AVERAGED)
    return averaged, [name for name in _RAW if name in names]


def _selection_notes(fitting: list[str]) -> list[str]:
    """The note that the first of the entries was taken, where there are others."""
    if len(fitting) < 2:
        return []
    kind = "the averaged weights " if _is_averaged(fitting[0]) else ""
    other = "the ones beside it" if fitting[1] == _TOP else repr(fitting[1])
    return [f"takes {kind}{fitting[0]!r}, not {other} (neon merge: --entry {fitting[1]} takes those)"]


def _is_averaged(name: str) -> bool:
    """`ema` as a word of its own: state_dict_ema, net_ema, ema_0.9999, modelEMA; not schema."""
    return "ema" in re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _some(names: Any, limit: int = 5) -> str:
    names = [str(name)[:100] for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


def _open_safetensors(path: Path) -> Weights:
    tensors, raw = open_tensors(path)
    metadata = {name: _maybe_json(text) for name, text in raw.items()}
    config = metadata.pop("config", None)
    if not isinstance(config, dict | None):
        metadata["config"], config = config, None
    if not tensors:
        raise Unfit("holds no tensors")
    return Weights(path, "safetensors", unwrapped(tensors), config, metadata)


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _open_pickle(path: Path, entry: str | None) -> Weights:
    entries = read_pickle(path)
    networks = {name: value for name, value in entries.items() if isinstance(value, PickledObject)}
    averaged, raw = _weight_entries([name for name, value in entries.items() if value is not None])
    fitting = [*averaged, *raw]
    selected = entry or next(iter(fitting), None)
    if selected not in networks:
        raise Unfit(f"has no network {selected or 'ema'!r}; its entries are {_some(entries)}")
    network = networks[selected]
    metadata: dict[str, Any] = {"entry": selected, "attributes": network.attributes}
    metadata["modules"] = {name: describe(child) for name, child in network.children.items()}
    for name, value in entries.items():
        if name != selected:
            metadata[name] = describe(value) if isinstance(value, PickledObject) else value
    tensors = dict(network.lazy_state())
    if not tensors:
        raise Unfit(f"its entry {selected!r} ({network.class_name}) holds no tensors")
    notes = [] if entry else _selection_notes(fitting)
    return Weights(path, "pickle", unwrapped(tensors), describe(network, with_attributes=False), metadata, notes)


def describe(pickled: PickledObject, with_attributes: bool = True) -> dict[str, Any]:
    """{"class", "args", "kwargs"} and, if asked for, "attributes" of a pickled object."""
    constructor = {"class": pickled.class_name, "args": pickled.init_args, "kwargs": pickled.init_kwargs}
    return constructor | ({"attributes": pickled.attributes} if with_attributes else {})
