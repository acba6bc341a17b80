"""The files that a command needs: given paths, published files in their standard place, or fetched now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from neon_files.downloads import ensure, fetch, is_url, local_copy
from neon_files.errors import UserError, say
from neon_files.home import home
from neon_files.manifest import MANIFEST, Missing


def find_all(sources: Mapping[str, str | Path | None]) -> dict[str, Path]:
    """The local file of every flag: {"--vae_ckpt": path or URL, ...} -> {"--vae_ckpt": path}; None is left out.

    Paths are resolved by `find_file`; URLs are fetched, unless a path is missing. Raises one UserError that names
    every missing file with its flag, and one command that fetches all published ones.
    """
    given = {flag: value for flag, value in sources.items() if value is not None}
    files: dict[str, Path] = {}
    lacking: dict[str, UserError] = {}
    for flag, value in sorted(given.items(), key=lambda item: is_url(item[1])):  # local paths first
        try:
            files[flag] = _present(str(value)) if is_url(value) and lacking else fetch(value)
        except UserError as error:
            lacking[flag] = error
    if lacking:
        raise UserError(_one_line({flag: lacking[flag] for flag in given if flag in lacking}))
    return {flag: files[flag] for flag in given}


def _present(url: str) -> Path:
    entry, path = local_copy(url)
    if entry in MANIFEST.entries and not path.is_file():
        raise Missing(url, "not fetched yet", "", entry)
    return path  # a URL that nobody publishes has no command; the next run fetches it


def _one_line(lacking: Mapping[str, UserError]) -> str:
    published = {flag: e for flag, e in lacking.items() if isinstance(e, Missing) and e.entry}
    clauses = [f"{flag} {error.message}" for flag, error in lacking.items() if flag not in published]
    if published:
        names = [f"{flag} {e.path}" + (f" ({e.reason})" if is_url(e.path) else "") for flag, e in published.items()]
        command = MANIFEST.command(*(e.entry.name for e in published.values() if e.entry))
        it = "it" if len(published) == 1 else "them"
        clauses.insert(0, f"not here: {', '.join(names)}; `{command}` fetches {it}")
    return "; ".join(clauses)


def obtain(path_or_url: str | Path) -> Path:
    """The local file. A published one that is missing is fetched into its place; every rank may call it.

    Raises UserError where there is neither a file nor a source for it.
    """
    try:
        return fetch(path_or_url)
    except Missing as error:
        if error.entry is None or is_url(path_or_url):
            raise
        place = home() / error.entry.destination
        ensure(error.entry, place, say=say)
        return place
