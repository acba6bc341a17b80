"""One weight file of a folder: opened with the names in the file, checked, written in its container."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.merge import check_quantized
from neon_files.atomic import atomic_path, write_json
from neon_files.checkpoint import open_checkpoint
from neon_files.errors import UserError
from neon_files.foreign import parse_json
from neon_files.safetensors_file import DTYPE_NAMES, Layout, read_header, write_safetensors

ADAPTER_CONFIG = "adapter_config.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".th")
NOT_WRITTEN = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".pkl", ".npz", ".npy", ".distcp")

Load = Callable[[], Tensor]
Writer = Callable[[Path], None]  # writes one file of the result to the path it is given


@dataclass
class WeightFile:
    """One weight file, opened. Names are those in the file where it is safetensors."""

    path: Path
    entry: str | None = None
    container: str = ""
    loaders: dict[str, Load] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # tied tensors that the file names but does not hold
    header: dict[str, str] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)
    _flat: bool = True  # false for a torch file that holds more than a state dict
    _versions: Any = None  # of modules, which torch keeps beside a state dict

    def __post_init__(self) -> None:
        weights = open_checkpoint(self.path, self.entry)
        self.container, self.loaders = weights.container, weights.loaders
        if self.container == "safetensors":
            names, self.header = read_header(self.path)  # unchanged: an index or another library uses them
            self.loaders = dict(zip(names, weights.loaders.values(), strict=True))
            self.aliases = {k: v for k, v in self.header.items() if k not in self.loaders and v in self.loaders}
        elif self.container == "pickle":
            raise UserError(f"{self.path}: is a pickled network, which is not written again; convert it to safetensors")
        else:
            names, self._versions = _flat_content(self.path)
            self._flat = len(names) == len(self.loaders)
            if self._flat:  # names unchanged, with prefixes
                self.loaders = dict(zip(names, weights.loaders.values(), strict=True))
        self.layout = dict(zip(self.loaders, weights.layout().values(), strict=True))
        check_quantized(self.layout, str(self.path))

    @cached_property
    def ties(self) -> list[list[str]]:
        """Groups of names of one tensor, from a safetensors header, or from shared memory in a torch file."""
        if self.container == "safetensors":
            return [[alias, kept] for alias, kept in self.aliases.items()]
        places: dict[tuple, list[str]] = {}
        for name, load in self.loaders.items():
            tensor = load()
            if tensor.numel():
                start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
                places.setdefault((*start, tensor.shape, tensor.stride()), []).append(name)
        return [names for names in places.values() if len(names) > 1]

    @cached_property
    def adapter_config(self) -> dict[str, Any] | None:
        """The settings of peft beside the file."""
        path = self.path.with_name(ADAPTER_CONFIG)
        settings = parse_json(path.read_bytes(), str(path)) if path.is_file() else None
        if not isinstance(settings, dict | None):
            raise UserError(f"{path}: is no table of settings; download it again")
        return settings

    def state(self) -> dict[str, Tensor]:
        return {name: load() for name, load in self.loaders.items()}

    def check_flat(self) -> None:
        """UserError where the file holds more than its state dict, which a rewritten file would lose or leave stale."""
        if not self._flat:
            raise UserError(
                f"{self.path}: is not one plain state dict, and the rest would not belong to the merged weights; save "
                "its weights alone, or merge the two files with -o x.safetensors"
            )

    def write(self, path: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """`state` in this file's container."""
        layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
        if self.container == "safetensors":
            write_safetensors(path, layout, lambda name: state[name], dict(header))
        else:
            write_torch(path, layout, lambda name: state[name], self._versions)


def _flat_content(path: Path) -> tuple[list[str], Any]:
    """(names, module versions) where a torch file is a plain state dict, else no names. The file was read before."""
    try:
        with open(path, "rb") as file:
            mapped = file.read(2) == b"PK"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # for files that torch does not load and our reader does
        return [], None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        return [], None
    return list(content), getattr(content, "_metadata", None)


def is_torch_name(path: Path) -> bool:
    """Whether a file of this name is expected to be a torch file. UserError for formats that are not written."""
    if path.suffix.lower() in NOT_WRITTEN:
        raise UserError(f"-o {path}: {path.suffix} is not written; name a .safetensors or a .pt file")
    return path.suffix.lower() in TORCH_SUFFIXES


def write_result(path: Path, layout: Layout, load: Callable[[str], Tensor], metadata: dict[str, str]) -> None:
    """A single merged file, in the container that its suffix names; a torch file has its provenance beside it."""
    if not is_torch_name(path):
        write_safetensors(path, layout, load, metadata)
        return
    write_torch(path, layout, load)
    write_json(path.with_name(f"{path.name}.json"), {name: _maybe_json(text) for name, text in metadata.items()})


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write_torch(path: Path, layout: Layout, load: Callable[[str], Tensor], versions: Any = None) -> None:
    """A plain state dict, whole in memory, since torch files cannot be written in parts; `versions` are of modules."""
    state: Any = OrderedDict((name, load(name)) for name in layout)
    if versions is not None:
        state._metadata = versions
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def check_writable(path: Path, layout: Layout) -> None:
    """UserError where safetensors cannot hold a tensor."""
    for name, (dtype, _) in layout.items():
        if dtype not in DTYPE_NAMES:
            raise UserError(
                f"{path}: {name} has the type {dtype}, which safetensors cannot hold; convert it, or -o x.pt"
            )
