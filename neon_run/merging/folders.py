"""Neon for whole folders (diffusers pipelines, sharded checkpoints) and for adapters, in files or folders.

Every weight file of the base is merged tensor by tensor and keeps its name, place, container and header; files of
kinds without weights are copied, and all others must be equal in both folders. A folder gets its final name when it is
complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neon_files.atomic import atomic_path, hidden, sha256_file, write_json
from neon_files.errors import UserError, say
from neon_files.lock import Timeout, locked
from neon_files.manifest import find_file
from neon_run.merging import contents
from neon_run.merging.adapters import Merged, adapter_kind, merge_adapters, reversed_adapter
from neon_run.merging.contents import Files, files_of
from neon_run.merging.files import check_output
from neon_run.merging.lora import modules_of
from neon_run.merging.steps import Steps, as_steps
from neon_run.merging.weight_file import ADAPTER_CONFIG, WeightFile, Writer, write_result
from neon_run.merging.weight_set import WeightSet

PROVENANCE = "neon_merge.json"


def merge_folders(
    base: str | Path,
    syn: str | Path,
    w: float | Steps,
    out: str | Path,
    scale: float | None = None,
    dense: bool = False,
) -> Path:
    """Merge the weights of two folders into the new folder `out` by the rule `neon`.

    A weight file of the base is matched with the files of the same place and stem in `syn`, however those are cut into
    shards; files equal in both are copied. Memory: about twice the largest tensor for safetensors, one file for torch
    containers, which cannot be written in parts. `scale`: alpha / r of LoRA adapters that do not say it; `dense`: names
    that look like an adapter's are a network's. Raises UserError as `neon_merge`, before anything is written wherever
    names and shapes tell.
    """
    steps, base, syn, out = as_steps(w), Path(base), Path(syn), Path(out)
    _check_places(out, base, syn)
    merge = _FolderMerge(files_of(base), files_of(syn), steps, scale, dense)
    for names in contents.weight_sets(merge.in_base).values():
        merge.add(names)
    if not merge.sources:
        raise UserError(f"{base} and {syn}: no weight files that differ; nothing to merge")
    merge.add_copies()
    merge.check()
    record = {
        **steps.record(),
        "rule": "neon",
        "base": {name: sha256_file(merge.in_base[name]) for name in merge.sources},
        "synthetic": {name: sha256_file(merge.in_syn[name]) for name in sorted(merge.used)},
        "folders": {"base": base.resolve().name, "synthetic": syn.resolve().name},
    }
    _write_folder(out, merge.in_base, merge.writers, record)
    return out


class _FolderMerge:
    """The plan for every file: `writers` by name for those that are not copied."""

    def __init__(self, in_base: Files, in_syn: Files, steps: Steps, scale: float | None, dense: bool):
        self.in_base, self.in_syn, self.steps, self.scale, self.dense = in_base, in_syn, steps, scale, dense
        self.writers: dict[str, Writer] = {}
        self.sources: dict[str, list[str]] = {}  # merged file -> files of the other side
        self.sets: list[WeightSet] = []
        self.left: list[list[str]] = []  # sets that are missing or equal on the other side
        self.pattern_names: list[str] = []
        self.syn_sets = contents.weight_sets(in_syn)

    @property
    def used(self) -> set[str]:
        return {name for names in self.sources.values() for name in names}

    def add(self, names: list[str]) -> None:
        """Merge the set of weights in these files of the base, if both sides have it and differ."""
        theirs = self._counterpart(names)
        if not theirs or all(contents.equal(name, self.in_base, self.in_syn) for name in names):
            self.left.append(names)
            return
        ours, others = self._open(names, self.in_base), self._open(theirs, self.in_syn)
        if not self.dense and any(adapter_kind(part) for part in (*ours, *others)):
            self._add_adapter(names, ours, others)
        else:
            place = Path(names[0]).parent.as_posix()
            self.sets.append(WeightSet(place, names, ours, others, self.steps))
            self.pattern_names += self.sets[-1].pattern_names()
            self.writers |= self.sets[-1].writers()
        self.sources |= dict.fromkeys(names, theirs)

    def _counterpart(self, names: list[str]) -> list[str]:
        """The files of the same set in the other folder: of the same container, else of the other one."""
        place, stem, _ = contents.key(names[0])
        same = self.syn_sets.get(contents.key(names[0]))
        return same or [n for key, files in self.syn_sets.items() if key[:2] == (place, stem) for n in files]

    def _open(self, names: list[str], files: Files) -> list[WeightFile]:
        return [WeightFile(files[name]) for name in names]

    def _add_adapter(self, names: list[str], ours: list[WeightFile], others: list[WeightFile]) -> None:
        if len(ours) > 1 or len(others) > 1:
            raise UserError(f"{ours[0].path}: one of several files of an adapter; only adapters in one file are merged")
        merged = merge_adapters(ours[0], others[0], self.steps, self.scale)
        for part in (ours[0], others[0]):
            self.pattern_names += [*part.loaders, *modules_of(part.loaders)]
        self.writers[names[0]] = lambda path: ours[0].write(path, merged.state, merged.header)
        if merged.config is not None:
            settings = Path(names[0]).with_name(ADAPTER_CONFIG).as_posix()
            self.writers[settings] = lambda path: write_json(path, merged.config)

    def add_copies(self) -> None:
        """Sets that were not merged: copies of merged ones are derived from those, others must be equal in both."""
        for names in self.left:
            path, place = self.in_base[names[0]], Path(names[0]).parent.as_posix()
            near = [s for s in self.sets if s.place == place] + self._same_pipeline(place)
            if not contents.is_container(path) and contents.equal(names[0], self.in_base, self.in_syn):
                continue  # a vocabulary, for example
            parts = self._open(names, self.in_base) if near else []
            relatives = [s for s in near if contents.family(s.names[0]) == contents.family(names[0])]
            copies = next(filter(None, (s.copies(names, parts) for s in near if s.place == place)), None)
            if copies:
                self.writers |= copies
            elif not all(contents.equal(name, self.in_base, self.in_syn) for name in names):
                raise UserError(
                    f"{path}: the other folder has no weights in its place; put the base's there if they were not "
                    "trained, or take them out of the base's folder"
                )
            elif relatives or self._adapter_of_family(names) or any(s.place != place for s in near):
                raise UserError(
                    f"{path}: is equal in both folders beside weights that are merged, and no rounded copy of those: "
                    "it would be the old network; take it out of the folder"
                )

    def _same_pipeline(self, place: str) -> list[WeightSet]:
        """The merged parts of a pipeline whose top folder is `place`: a file there holds the whole network."""
        index = "model_index.json" if place == "." else f"{place}/model_index.json"
        inside = "" if place == "." else f"{place}/"
        return [s for s in self.sets if index in self.in_base and s.place != place and s.place.startswith(inside)]

    def _adapter_of_family(self, names: list[str]) -> bool:
        return any(contents.family(name) == contents.family(names[0]) for name in self.sources)

    def check(self) -> None:
        self.steps.check_used(self.pattern_names)
        self.steps.say_kept("the result", self.pattern_names)
        contents.check_others(self.in_base, self.in_syn, self.sources)
        contents.check_indices(self.in_base, self.writers)
        extra = [n for names in self.syn_sets.values() for n in names if n not in self.in_base and n not in self.used]
        if extra:
            say(f"{len(extra)} weight files that the base's folder lacks are left out: {', '.join(extra[:3])}")


def reverse_adapter(adapter: str | Path, w: float | Steps, out: str | Path) -> Path:
    """The adapter of theta_base - w (theta_syn - theta_base) for one that was trained on synthetic data.

    A file gives a file, a folder gives a folder with everything else copied. Raises UserError.
    """
    steps, adapter, out = as_steps(w), Path(adapter), Path(out)
    if not adapter.is_dir():
        part = WeightFile(find_file(adapter))
        check_output(out, part.path)
        _check_patterns(steps, out, part)
        _write_adapter(out, reversed_adapter(part, steps))
        return out
    _check_places(out, adapter)
    files = files_of(adapter)
    parts = {name: WeightFile(path) for name, path in files.items() if contents.kind(path) == "weights"}
    if not parts:
        raise UserError(f"{adapter}: holds no weight files")
    _check_patterns(steps, out, *parts.values())
    contents.check_others(files, files, parts)
    record = {**steps.record(), "base": "no adapter", "synthetic": {name: sha256_file(files[name]) for name in parts}}
    _write_folder(out, files, {name: _reverse_writer(part, steps) for name, part in parts.items()}, record)
    return out


def _check_patterns(steps: Steps, out: Path, *parts: WeightFile) -> None:
    steps.check_used([name for part in parts for name in (*part.loaders, *modules_of(part.loaders))])
    steps.say_kept(out, dict.fromkeys(name for part in parts for name in part.loaders))


def _reverse_writer(part: WeightFile, steps: Steps) -> Writer:
    part.check_flat()
    merged = reversed_adapter(part, steps)
    return lambda path: part.write(path, merged.state, merged.header)


def merge_adapter_files(
    base: WeightFile, syn: WeightFile, w: float | Steps, out: str | Path, scale: float | None = None
) -> Path:
    """Merge two adapters into the file `out`."""
    steps, out = as_steps(w), Path(out)
    check_output(out, base.path, syn.path)
    merged = merge_adapters(base, syn, steps, scale)
    _check_patterns(steps, out, base, syn)
    if merged.config is not None:
        raise UserError(f"{base.path}: has its rank and alpha in {ADAPTER_CONFIG} beside it; give the two folders")
    _write_adapter(out, merged)
    return out


def _write_adapter(out: Path, merged: Merged) -> None:
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in merged.state.items()}
    write_result(out, layout, lambda name: merged.state[name], merged.header)


# Folders


def _check_places(out: Path, *inputs: Path) -> None:
    for folder in inputs:
        if not folder.is_dir():
            problem = "does not exist" if not folder.exists() else "is a file, the other one a folder"
            raise UserError(f"{folder}: {problem}; name a folder")
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"-o {out}: lies within {folder}; name a place outside of the inputs")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"-o {out}: already exists; name a new folder, or remove it")


def _write_folder(out: Path, files: Mapping[str, Path], writers: dict[str, Writer], record: Mapping[str, Any]) -> None:
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
    """A new temporary folder beside `final`, renamed to it when the body ends, removed if the body fails.

    One process at a time; the next one removes the remains of a killed one. Raises UserError where the place cannot be
    written, and where `final` holds something.
    """
    final = Path(final)
    temporary, lock = (final.with_name(f"{hidden(final.name)}{end}") for end in (".part", ".lock"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, timeout=0):
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
