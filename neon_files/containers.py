"""What is inside a weight file, told by its content: the name says nothing.

`open_weights` knows the published containers (torch zip and legacy, pickled networks, safetensors), the ways in which
training scripts nest and prefix a state dict, and gives its tensors one at a time. Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neon_files.errors import UserError
from neon_files.pickles import LazyTensor, PickledObject, Refused, read_pickle, refusal
from neon_files.safetensors_file import read_header

_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number 0x1950a86a20f9469cfc6c
# Entries under which training scripts keep a state dict, the preferred first: averaged weights are what is published.
_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict")
_NESTS = (*_AVERAGED, "trainer", "var_wo_ddp", "state_dict", "model", "module", "net")
_PREFIXES = ("module.", "_orig_mod.")
AGAIN = "download it again"


@dataclass
class Weights:
    """An opened weight file. `loaders[name]()` gives one tensor on the CPU, in the order of the state dict."""

    path: Path
    container: str  # torch | torch-legacy | pickle | safetensors
    loaders: dict[str, Callable[[], Tensor]]
    config: dict[str, Any] | None = None  # {"class": ..., "args": [...], "kwargs": {...}}: how the network was made
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # choices that the user should hear of

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor. Mapped files are not read for it, pickled ones are decoded."""
        found = ((name, load()) for name, load in self.loaders.items())
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found}


def open_weights(path: str | Path, entry: str | None = None) -> Weights:
    """The weights in `path`; `entry` names the state dict to take where a file holds several ("model", "ema", ...).

    Raises UserError for a file that is empty, cut short, something else, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise UserError(f"{path}: is empty; {AGAIN}")
    if start.startswith(b"PK\x03\x04"):
        return _open_torch(path, "torch", entry)
    if start.startswith(_LEGACY_TORCH):
        return _open_torch(path, "torch-legacy", entry)
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if (start[:1] == b"\x80" and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])) or start[:1] in b"(]}":
        return _open_pickle(path, entry)
    raise UserError(f"{path}: {_foreign(start)}")


def _foreign(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return f"is a web page, probably an error message saved by a download; {AGAIN}"
    if text.startswith(b"version https://git-lfs"):
        return f"is a Git LFS pointer, not the file itself; {AGAIN}"
    if text.startswith(b"\x93numpy"):
        return "is a NumPy array, not weights"
    if not start.strip(b"\0"):
        return f"begins with zeros: an unfinished download; {AGAIN}"
    return "is no weight file that we know (torch, safetensors, or a pickled EDM or IMM network)"


def _open_torch(path: Path, container: str, entry: str | None) -> Weights:
    is_zip = container == "torch"
    if is_zip:
        _check_torch_zip(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about storages of old files
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named[1]}" if named else "is damaged or holds more than tensors and plain values"
        raise UserError(
            f"{path}: refused, nothing in it was run: it {what}; save a plain state dict instead, or {AGAIN}"
        ) from error
    except Exception as error:  # torch tells of damage in many ways: RuntimeError, EOFError, KeyError, ...
        raise UserError(f"{path}: cut short or damaged ({_first_line(error)}); {AGAIN}") from error
    opened = Weights(path, container, {})
    state = _unnest(content, entry, opened)
    opened.loaders = {name: lambda tensor=tensor: tensor for name, tensor in _unprefix(state, path).items()}
    return opened


def _check_torch_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: cut short (a torch file without its end); {AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {AGAIN}") from error
    if any(name.endswith(".npy") for name in members):
        raise UserError(f"{path}: is a NumPy archive (reference statistics?), not weights")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in members):
        raise UserError(f"{path}: is a zip archive, but not one of torch")
    if any(name.endswith("/constants.pkl") for name in members):
        raise UserError(f"{path}: is a TorchScript program, not weights; save its state_dict instead")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _unnest(content: Any, entry: str | None, opened: Weights, trail: str = "") -> dict[str, Tensor]:
    """The state dict within what torch.load gave. Small plain values beside it go to `opened.metadata`."""
    if not isinstance(content, dict):
        raise UserError(f"{opened.path}: holds a {type(content).__name__}, not a state dict")
    if entry is not None:
        if entry not in content:
            raise UserError(f"{opened.path}: has no entry {entry!r}; it has {_some(content)}")
        return _unnest(content[entry], None, opened, f"{trail}{entry}.")
    nests = [name for name in _NESTS if isinstance(content.get(name), dict)]
    plain = {name: v for name, v in content.items() if v is None or isinstance(v, str | bool | int | float)}
    opened.metadata |= {str(name): value for name, value in plain.items()}
    if nests:
        taken = nests[0]
        if taken in _AVERAGED and len(nests) > 1:
            opened.notes.append(f"takes the averaged weights {trail + taken!r}, not {trail + nests[1]!r}")
        return _unnest(content[taken], None, opened, f"{trail}{taken}.")
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state or not all(isinstance(name, str) for name in state):
        where = f"its entry {trail.rstrip('.')!r}" if trail else "it"
        raise UserError(f"{opened.path}: no weights found; {where} has {_some(content)}")
    if any(
        isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()) for value in content.values()
    ):
        dicts = [name for name, value in content.items() if isinstance(value, dict)]
        raise UserError(
            f"{opened.path}: tensors both directly and in {_some(dicts)}: which of them is meant is unclear"
        )
    return state


def _some(names: Any, limit: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


def _unprefix(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Names without what DDP and torch.compile put before them, where every name has it."""
    found = True
    while found:
        found = False
        for prefix in _PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                found = True
    return state


def _open_safetensors(path: Path) -> Weights:
    try:
        names, raw = read_header(path)
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, ValueError) as error:  # ValueError: of the header's JSON
        raise UserError(f"{path}: not a whole safetensors file ({_first_line(error)}); {AGAIN}") from error
    metadata = {name: _maybe_json(text) for name, text in raw.items()}
    config = metadata.pop("config", None)
    if not isinstance(config, dict | None):
        metadata["config"], config = config, None
    loaders = {name: lambda name=name: file.get_tensor(name) for name in names}
    if not loaders:
        raise UserError(f"{path}: holds no tensors")
    return Weights(path, "safetensors", _unprefix(loaders, path), config, metadata)


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _open_pickle(path: Path, entry: str | None) -> Weights:
    entries = read_pickle(path)
    networks = {name: value for name, value in entries.items() if isinstance(value, PickledObject)}
    wanted = entry or next((name for name in _NESTS if name in networks), None)
    if wanted not in networks:
        raise UserError(f"{path}: has no network {wanted or 'ema'!r}; its entries are {_some(entries)}")
    network = networks[wanted]
    metadata: dict[str, Any] = {"entry": wanted, "attributes": network.attributes}
    metadata["modules"] = {name: describe(child) for name, child in network.children.items()}
    for name, value in entries.items():
        if name != wanted:
            metadata[name] = describe(value) if isinstance(value, PickledObject) else value

    def loader(tensor: LazyTensor) -> Callable[[], Tensor]:
        def load() -> Tensor:
            try:
                return tensor.load()
            except Refused as error:
                raise refusal(path, error) from error

        return load

    loaders = {name: loader(tensor) for name, tensor in network.lazy_state()}
    if not loaders:
        raise UserError(f"{path}: its entry {wanted!r} ({network.class_name}) holds no tensors")
    return Weights(path, "pickle", _unprefix(loaders, path), describe(network, with_attributes=False), metadata)


def describe(pickled: PickledObject, with_attributes: bool = True) -> dict[str, Any]:
    """{"class", "args", "kwargs"} and, if asked for, "attributes" of a pickled object."""
    made_from = {"class": pickled.class_name, "args": pickled.init_args, "kwargs": pickled.init_kwargs}
    return made_from | ({"attributes": pickled.attributes} if with_attributes else {})
