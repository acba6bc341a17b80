"""Neon for whole folders (diffusers pipelines, sharded checkpoints) and for LoRA adapters, in files or folders.

Every weight file of the base is merged tensor by tensor and keeps its name, place, container and header; everything
else is copied. A folder appears under its final name when it is complete.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neon_core.merge import check_w
from neon_files.atomic import atomic_path, sha256_file, write_json
from neon_files.checkpoint import pack_metadata
from neon_files.containers import open_weights
from neon_files.errors import UserError
from neon_files.manifest import find_file
from neon_run.merging import lora
from neon_run.merging.weight_file import WeightFile, Writer, plain_writers

PROVENANCE = "neon_merge.json"
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".pkl")
# What a trainer keeps beside its weights.
_STATE_OF_TRAINING = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states)[\w.-]*", re.I)
_LEFT_OUT = (".git", ".cache")  # of a clone, of a download
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def merge_folders(base: str | Path, syn: str | Path, w: float, out: str | Path) -> Path:
    """Merge the weights of two folders into the new folder `out` by the rule `neon`.

    A weight file of the base is matched with the files of the same place and stem in `syn`, however those are cut into
    shards; files equal in both are copied. Memory: about twice the largest tensor for safetensors, one file for torch
    containers, which cannot be written in parts. Raises UserError as `neon_merge`, before anything is written wherever
    names and shapes tell.
    """
    check_w(w)
    base, syn, out = Path(base), Path(syn), Path(out)
    _check_places(out, base, syn)
    in_base, in_syn = _files(base), _files(syn)
    writers: dict[str, Writer] = {}
    sources: dict[str, list[str]] = {}  # merged file -> what it was merged with
    for key, names in _groups(base, in_base, in_syn).items():
        theirs = _counterpart(key, in_syn)
        if not theirs:
            raise UserError(
                f"{base / names[0]}: {syn} has no weights in its place; put the base's there if they were not trained, "
                "or take them out of the base's folder"
            )
        ends = [WeightFile(folder[name]) for folder, some in ((in_base, names), (in_syn, theirs)) for name in some]
        ours, others = ends[: len(names)], ends[len(names) :]
        if lora.is_lora(name for part in ours for name in part.loaders):
            made = _adapter_writers(names, ours, theirs, others, w)
        else:
            made = plain_writers(names, ours, others, w)
        writers |= made
        sources |= dict.fromkeys(names, theirs)
    if not writers:
        raise UserError(f"{base} and {syn}: no weight files that differ; nothing to merge")
    _check_indices(in_base, writers)
    record = {
        "w": w,
        "rule": "neon",
        "base": {name: sha256_file(in_base[name]) for name in sources},
        "synthetic": {
            name: sha256_file(in_syn[name]) for name in sorted({n for some in sources.values() for n in some})
        },
        "folders": {"base": base.resolve().name, "synthetic": syn.resolve().name},
    }
    _write_folder(out, in_base, writers, record)
    return out


def reverse_adapter(adapter: str | Path, w: float, out: str | Path) -> Path:
    """The adapter of theta_base - w (theta_syn - theta_base) for a LoRA that was trained on synthetic data.

    A file gives a safetensors file, a folder gives a folder with everything else copied. Raises UserError.
    """
    check_w(w)
    adapter, out = Path(adapter), Path(out)
    if not adapter.is_dir():
        part = WeightFile(find_file(adapter))
        if out.exists() and out.samefile(part.path):
            raise UserError(f"-o {out}: is the input; name another file")
        _reverse_writer(part, w, as_safetensors=True)(out)
        return out
    _check_places(out, adapter)
    files, writers = _files(adapter), {}
    for name in files:
        if _is_weights(name):
            writers[name] = _reverse_writer(WeightFile(files[name]), w)
    if not writers:
        raise UserError(f"{adapter}: holds no weight files")
    record = {"w": w, "base": "no adapter", "synthetic": {name: sha256_file(files[name]) for name in writers}}
    _write_folder(out, files, writers, record)
    return out


def merge_adapter_files(base: str | Path, syn: str | Path, w: float, out: str | Path) -> Path:
    """Merge two LoRA files into the safetensors file `out`."""
    check_w(w)
    out, parts = Path(out), [WeightFile(find_file(path)) for path in (base, syn)]
    for part in parts:
        if out.exists() and out.samefile(part.path):
            raise UserError(f"-o {out}: is one of the inputs; name another file")
        if not lora.is_lora(part.loaders):
            raise UserError(f"{part.path}: is no LoRA adapter, the other one is; `--lora` takes an adapter alone")
        if part.adapter_config is not None:
            raise UserError(f"{part.path}: has its rank and alpha in {lora.CONFIG} beside it; give the two folders")
    merged, _ = _merged_adapter(*parts, w)
    merged(out, True)
    return out


def is_adapter_file(path: str | Path) -> bool:
    """Whether the tensors in this weight file are those of a LoRA adapter."""
    return lora.is_lora(open_weights(path).loaders)


# Adapters


def _reverse_writer(part: WeightFile, w: float, as_safetensors: bool = False) -> Writer:
    if not lora.is_lora(part.loaders):
        raise UserError(f"--lora {part.path}: holds no LoRA factors; give the two checkpoints without --lora")
    state = lora.reverse_lora(part.state(), w, str(part.path), part.adapter_config, part.header)
    record = {"w": w, "base": "no adapter", "synthetic": {"file": part.path.name, "sha256": sha256_file(part.path)}}
    header = {**part.header, **pack_metadata(None, {"neon": record})}
    return lambda path: part.write(path, state, header, as_safetensors)


def _merged_adapter(
    base: WeightFile, syn: WeightFile, w: float
) -> tuple[Callable[[Path, bool], None], dict[str, Any] | None]:
    """(writer, peft's settings if the base has them) of the merged adapter."""
    ours, theirs = base.adapter(), syn.adapter()
    state, rank = lora.merge_lora(ours, theirs, w)
    ends = {"base": base.path, "synthetic": syn.path}
    record = {side: {"file": path.name, "sha256": sha256_file(path)} for side, path in ends.items()}
    header = lora.merged_header(base.header, rank) | pack_metadata(None, {"neon": {"w": w, "rule": "neon", **record}})
    config = None
    if base.adapter_config is not None:
        modules = ours.pairs.keys() | theirs.pairs.keys() if ours.pairs.keys() != theirs.pairs.keys() else None
        config = lora.merged_config(base.adapter_config, rank, modules)
    return lambda path, safetensors: base.write(path, state, header, safetensors), config


def _adapter_writers(
    names: list[str], ours: list[WeightFile], theirs: list[str], others: list[WeightFile], w: float
) -> dict[str, Writer]:
    if len(ours) > 1 or len(others) > 1:
        raise UserError(f"{ours[0].path}: one of several files of an adapter; only adapters in one file are merged")
    if not lora.is_lora(others[0].loaders):
        raise UserError(f"{others[0].path}: is no LoRA adapter, {ours[0].path} is")
    write, config = _merged_adapter(ours[0], others[0], w)
    writers: dict[str, Writer] = {names[0]: lambda path: write(path, False)}
    if config is not None:
        writers[str(Path(names[0]).with_name(lora.CONFIG))] = lambda path: write_json(path, config)
    return writers


# Folders


def _files(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, sorted; links are followed (a hub cache is made of them)."""
    found, seen = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise UserError(f"{place}: a link that leads round in a circle; remove it")
        seen.add(real)
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = Path(place, name)
            if not path.is_file():
                raise UserError(f"{path}: a broken link or no regular file; complete the folder or remove it")
            found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _is_weights(name: str) -> bool:
    path = Path(name)
    return path.suffix in (".safetensors", *_TORCH, *_OTHER_WEIGHTS) and not _STATE_OF_TRAINING.fullmatch(path.name)


def _key(name: str) -> tuple[str, str, str]:
    """(place and stem, variant included; container) of a weight file; equal for the shards of one set of weights."""
    path = Path(name)
    stem = _SHARD.sub("", path.stem).replace("pytorch_model", "model")  # Hugging Face's name in torch containers
    return path.parent.as_posix(), stem, ".safetensors" if path.suffix == ".safetensors" else ".torch"


def _groups(base: Path, in_base: dict[str, Path], in_syn: dict[str, Path]) -> dict[tuple, list[str]]:
    """The base's weight files to merge, those of one set together. Sets that are equal in both are to be copied."""
    groups: dict[tuple, list[str]] = {}
    for name in in_base:
        if _is_weights(name):
            groups.setdefault(_key(name) if Path(name).suffix not in _OTHER_WEIGHTS else (name,), []).append(name)
    changed = {
        key: names
        for key, names in groups.items()
        if not all(name in in_syn and filecmp.cmp(in_base[name], in_syn[name], shallow=False) for name in names)
    }
    for key, names in changed.items():
        if len(key) == 1:
            raise UserError(f"{base / names[0]}: weights in a format that is not merged; take it out of the folder")
    return changed


def _counterpart(key: tuple[str, str, str], in_syn: dict[str, Path]) -> list[str]:
    """The files of the same set in the other folder: of the same container, else of the other one."""
    weights = [name for name in in_syn if _is_weights(name) and Path(name).suffix not in _OTHER_WEIGHTS]
    same = [name for name in weights if _key(name) == key]
    return same or [name for name in weights if _key(name)[:2] == key[:2]]


def _check_indices(in_base: dict[str, Path], writers: Mapping[str, Writer]) -> None:
    """UserError where an index names a tensor or a file that is not there: the result could not be loaded."""
    for name, path in in_base.items():
        if not name.endswith(".index.json"):
            continue
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no index of shards ({type(error).__name__}: {error})") from error
        for file in dict.fromkeys(weight_map.values()):
            shard = (Path(name).parent / file).as_posix()
            if shard not in in_base:
                raise UserError(f"{path}: names {file}, which is not there; complete the folder")
            if shard in writers:
                inside = WeightFile(in_base[shard]).loaders
                absent = [key for key, place in weight_map.items() if place == file and key not in inside]
                if absent:
                    raise UserError(f"{path}: says that {absent[0]} is in {file}, where it is not; download it again")


def _check_places(out: Path, *inputs: Path) -> None:
    for folder in inputs:
        if not folder.is_dir():
            what = "does not exist" if not folder.exists() else "is a file, the other one a folder"
            raise UserError(f"{folder}: {what}; name a folder")
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"-o {out}: lies within {folder}; name a place outside of the inputs")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"-o {out}: is there already; name a new folder, or remove it")


def _write_folder(out: Path, files: dict[str, Path], writers: dict[str, Writer], record: Mapping[str, Any]) -> None:
    with atomic_folder(out) as temporary:
        for name, source in files.items():
            if name in writers:
                writers[name](temporary / name)
            else:
                with atomic_path(temporary / name) as copy:
                    shutil.copyfile(source, copy)
        write_json(temporary / PROVENANCE, record)


@contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """A new temporary folder beside `final`, renamed to it when the body ends; if the body fails it goes.

    One process at a time; what a killed one left is removed by the next. Raises UserError where the place cannot be
    written, and where `final` holds something.
    """
    final = Path(final)
    temporary, lock = final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                yield temporary
                if final.exists():
                    final.rmdir()  # empty, or this fails
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{final}: another process is writing it; wait for it or name another folder") from error
    except OSError as error:
        if error.filename is None or Path(error.filename) not in {final, temporary, lock, *final.parents}:
            raise
        raise UserError(f"{final}: cannot write there ({error.strerror}); name another place") from error
