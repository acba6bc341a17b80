"""The files that the rows of the table need: where each is published, its local place, its size and hash.

The list is data, `manifest.json` beside this file. Sizes and hashes in it are those of the publishers' pages;
`"confirmed": false` marks a hash that only third parties state: the hub's hash takes precedence over it. Without a
hash in the list the hub's is used, where there is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from neon_files.errors import UserError, say
from neon_files.home import download_command, home

_SUFFIXES = (".pth", ".pkl", ".pt", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Entry:
    """One published file: on the hub (`repo` and `path`) or at a plain `url`."""

    name: str  # file name on disk
    folder: str  # under `home()`
    repo: str = ""  # hub repository
    path: str = ""  # in the repository; default: name
    url: str = ""
    revision: str = "main"
    size: int | None = None  # bytes
    sha256: str = ""
    confirmed: bool = True
    licence: str = "not stated"
    aliases: tuple[str, ...] = ()  # other spellings that commands use

    @property
    def destination(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def source(self) -> str:
        return self.url or f"hub {self.repo}, {self.path or self.name}"

    @property
    def restricted(self) -> bool:
        return NON_COMMERCIAL in self.licence


@dataclass(frozen=True)
class Manifest:
    """The published files, and the words for groups of them."""

    entries: tuple[Entry, ...]
    rows: dict[str, tuple[str, ...]]
    default: tuple[str, ...]  # names fetched where no word is given
    licences: dict[str, str] = field(default_factory=dict)  # word -> the licence in full

    def entry(self, name: str) -> Entry | None:
        """By name or alias, whatever the case; a folder before it is ignored."""
        basename = name.replace("\\", "/").rsplit("/", 1)[-1].lower()
        for entry in self.entries:
            if basename in (entry.name.lower(), *(alias.lower() for alias in entry.aliases)):
                return entry
        return None

    def select(self, words: tuple[str, ...]) -> list[Entry]:
        """The files that the words (rows or file names) stand for, each once. Raises UserError for an unknown word."""
        names: list[str] = [] if words else list(self.default)
        for word in words:
            if word.lower() in self.rows:
                names += self.rows[word.lower()]
            elif self.entry(word):
                names.append(word)
            else:
                raise UserError(f"{word}: neither a row nor a file; rows: {', '.join(self.rows)}; files: see --list")
        return list(dict.fromkeys(entry for name in names if (entry := self.entry(name))))

    def command(self, *names: str) -> str | None:
        """The shortest command that fetches the files of these names; None where one of them is not published."""
        entries = [entry for name in names if (entry := self.entry(name))]
        if len(entries) < len(names):
            return None
        required = {entry.name for entry in entries}
        rows = [row for row, files in self.rows.items() if required <= set(files)]
        whole = [row for row in rows if required == set(self.rows[row])]
        words = whole[:1] or (rows if len(rows) == 1 else list(dict.fromkeys(e.name for e in entries)))
        return download_command(*words)


def read_manifest(path: str | Path) -> Manifest:
    """The list of files in a JSON file: {"entries": [{"name", "folder", "url" or "repo", ...}], "rows", "default"}.

    An entry's licence is a word of {"licences": {word: text}} or the text itself. Raises UserError.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        licences = dict(content.get("licences", {}))
        entries = tuple(_entry(line, licences) for line in content["entries"])
        rows = {row: tuple(names) for row, names in content.get("rows", {}).items()}
        default = tuple(content.get("default", [entry.name for entry in entries]))
        unknown = {*default, *itertools.chain(*rows.values())} - {entry.name for entry in entries}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} under rows or default, but not under entries")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of published files ({type(error).__name__}: {error})") from error
    return Manifest(entries, rows, default, licences)


def _entry(line: dict, licences: dict[str, str]) -> Entry:
    entry = Entry(**line)
    if bool(entry.repo) == bool(entry.url):
        raise ValueError(f"{entry.name}: either a repo or a url")
    if "/" in entry.name or len(os.fsencode(entry.name)) > 255 or {"..", "/"} & set(Path(entry.folder).parts):
        raise ValueError(f"{entry.folder}/{entry.name}: not a name and a folder below the root")
    return dataclasses.replace(entry, licence=licences.get(entry.licence, entry.licence), aliases=tuple(entry.aliases))


MANIFEST = read_manifest(Path(__file__).with_name("manifest.json"))
MIT, NON_COMMERCIAL = (MANIFEST.licences[word] for word in ("MIT", "non-commercial"))


class Missing(UserError):
    """A file that does not exist: `path` as the user wrote it, its manifest `entry` where it is published."""

    def __init__(self, path: str | Path, reason: str, remedy: str, entry: Entry | None = None):
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path, self.reason, self.entry = path, reason, entry


def find_file(path: str | Path) -> Path:
    """`path`, or where it does not exist the one file that matches it, which is then reported.

    A match is a file beside it with the same name but for case and a weight file's ending; else, for a bare name or
    the place of a published file relative to `home()` (like `fid_stats/NAME`), the file there. Raises Missing, which
    names the command to fetch the file, and UserError for a folder or several candidates.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file in it")
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{path}: cannot be looked for ({error.strerror}); name another file") from error
    entry = MANIFEST.entry(path.name)
    names = {path.name, *((entry.name, *entry.aliases) if entry else ())}
    alike = [other for other in _files_beside(path) if any(_same_file_name(other.name, name) for name in names)]
    if not alike and entry and path in (Path(path.name), Path(entry.folder, path.name)):
        alike = [place for place in (home() / entry.destination,) if place.is_file()]
    if len(alike) == 1:
        say(f"{path}: not there; using {alike[0]}")
        return alike[0]
    if alike:
        raise UserError(f"{path}: does not exist; name one of {', '.join(str(other) for other in alike)}")
    if entry is None:
        remedy = f"nobody publishes a file of this name (`{download_command('--list')}`), so name another one"
        raise Missing(path, "does not exist", remedy)
    remedy = f"`{MANIFEST.command(path.name)}` puts {entry.name} into {home() / entry.folder}"
    raise Missing(path, "does not exist", remedy, entry)


def _files_beside(path: Path) -> list[Path]:
    try:
        return sorted(other for other in path.parent.iterdir() if other.is_file())
    except OSError:
        return []


def _same_file_name(one: str, other: str) -> bool:
    (stem, suffix), (other_stem, other_suffix) = (os.path.splitext(name.lower()) for name in (one, other))
    return stem == other_stem and (suffix == other_suffix or {suffix, other_suffix} <= set(_SUFFIXES))
