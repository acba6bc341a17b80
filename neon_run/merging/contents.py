"""The kinds of a folder's files: weights to merge, text, a trainer's state, or files that must be equal in both."""

from __future__ import annotations

import filecmp
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from neon_files.errors import UserError, say
from neon_files.foreign import parse_json
from neon_run.merging.weight_file import NOT_WRITTEN, TORCH_SUFFIXES, WeightFile

Files = Mapping[str, Path]  # name within the folder, with slashes -> file

_TEXT = (
    ".json", ".txt", ".md", ".rst", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".py", ".sh", ".jinja", ".csv", ".tsv",
    ".log", ".html", ".svg", ".ipynb", "",
)  # fmt: skip
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".pdf")
_NUMBERS = (".npz", ".npy")  # not always of a network
# Files that trainers keep beside their weights, by name.
_STATE_OF_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|custom_checkpoint|training_args|dl_state_dict)"
    r"(_\d+)?\.(bin|pt|pth|pkl)|events\.out\.tfevents\..*"
)
_LEFT_OUT = (".git", ".cache", "__MACOSX", ".ipynb_checkpoints")  # of a clone, a download, an archive, a notebook
_CLUTTER = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini")  # of desktop systems
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"


def files_of(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, sorted; links are followed (a hub cache is made of them)."""
    files, seen = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise UserError(f"{place}: a link that leads back to a folder above it; remove it")
        seen.add(real)
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            if _CLUTTER.fullmatch(name):
                continue
            path = Path(place, name)
            if not path.is_file():
                raise UserError(f"{path}: a broken link or no regular file; complete the folder or remove it")
            files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def kind(path: Path) -> str:
    """weights (to be merged), state (of a trainer), text (settings, pictures), model (in a format that is not written)
    or other: by the name, and where that is ambiguous by the content."""
    suffix = path.suffix.lower()
    if _STATE_OF_TRAINING.fullmatch(path.name):
        return "state"
    if suffix in (".safetensors", *TORCH_SUFFIXES):
        return "weights"
    if suffix in NOT_WRITTEN:
        return "other" if suffix in _NUMBERS else "model"
    if suffix in _PICTURES:
        return "text"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(_LEGACY_TORCH) or start[8:9] == b"{" or _is_torch_zip(path, start):
        return "weights"
    hidden = path.name.startswith(".") and not path.suffixes
    return "text" if (suffix in _TEXT or hidden) and _is_text(start) else "other"


def is_container(path: Path) -> bool:
    """Whether a file is a zip, a pickle or safetensors; raw bytes, whatever their suffix, are no weights of torch."""
    with open(path, "rb") as file:
        start = file.read(16)
    return start.startswith((b"PK", b"\x80")) or start[8:9] == b"{" or path.name.startswith("openvino")


def _is_torch_zip(path: Path, start: bytes) -> bool:
    if not start.startswith(b"PK\x03\x04"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many kinds on damage; then the file must be equal in both folders
        return False


def _is_text(start: bytes) -> bool:
    if b"\0" in start:
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(start) - 4  # a letter cut in two by the end of the sample
    return True


def key(name: str) -> tuple[str, str, str]:
    """(place, stem with its variant, container) of a weight file; equal for the shards of one set of weights."""
    path = Path(name)
    stem = _SHARD.sub("", path.stem).replace("pytorch_model", "model")  # Hugging Face's name in torch containers
    container = ".safetensors" if path.suffix.lower() == ".safetensors" else ".torch"
    return path.parent.as_posix(), stem, container


def family(name: str) -> tuple[str, str]:
    """(place, stem) of a weight file without its variant: `model.fp16.safetensors` and `model.bin` are of one."""
    place, stem, _ = key(name)
    return place, stem.partition(".")[0]


def weight_sets(files: Files) -> dict[tuple[str, str, str], list[str]]:
    """The weight files, those of one set together."""
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name, path in files.items():
        if kind(path) == "weights":
            sets.setdefault(key(name), []).append(name)
    return sets


def equal(name: str, in_base: Files, in_syn: Files) -> bool:
    return name in in_syn and filecmp.cmp(in_base[name], in_syn[name], shallow=False)


def check_others(in_base: Files, in_syn: Files, merged: Iterable[str]) -> None:
    """UserError where a file that is not merged may be of the old network; reports the files taken from the base."""
    places, differing = {Path(name).parent.as_posix() for name in merged}, []
    for name, path in in_base.items():
        file_kind = kind(path)
        if file_kind == "weights":
            continue
        if file_kind in ("text", "state"):
            if name in in_syn and not equal(name, in_base, in_syn):
                differing.append(name)
        elif not equal(name, in_base, in_syn):
            where = "differs between the two folders" if name in in_syn else "is not in the other folder"
            raise UserError(
                f"{path}: {where}, and is neither text nor weights in a format that is merged; take it out of the "
                "base's folder, or put the same file into both"
            )
        elif file_kind == "model" and any(_related(Path(name).parent.as_posix(), place) for place in places):
            raise UserError(
                f"{path}: weights in a format that is not merged, beside weights that are: it would be the old "
                "network; take it out of the folder"
            )
    if differing:
        some = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        say(f"{len(differing)} files that differ are the base's in the result: {some}")


def _related(place: str, other: str) -> bool:
    """Whether one of two places lies within the other; the root, ".", holds all."""
    if place == other or "." in (place, other):
        return True
    return place.startswith(f"{other}/") or other.startswith(f"{place}/")


def check_indices(in_base: Files, written: Iterable[str]) -> None:
    """UserError where an index names a missing tensor or file: the result could not be loaded."""
    written = set(written)
    for name, path in in_base.items():
        if not re.search(r"\.index(\.[\w-]+)?\.json$", name):
            continue
        try:
            weight_map = parse_json(path.read_bytes(), str(path))["weight_map"]
            places = dict.fromkeys(weight_map.values())
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is no index of shards ({type(error).__name__}: {error})") from error
        for file in places:
            shard = (Path(name).parent / str(file)).as_posix()
            if shard not in in_base:
                raise UserError(f"{path}: names {file}, which is missing; complete the folder")
            if shard in written:
                inside = WeightFile(in_base[shard]).loaders
                absent = [entry for entry, place in weight_map.items() if place == file and entry not in inside]
                if absent:
                    raise UserError(f"{path}: places {absent[0]} in {file}, which lacks it; download it again")
