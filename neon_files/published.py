"""A file that a command needs, wherever it is: here, where `download_models.sh` puts it, or fetched now."""

from __future__ import annotations

from pathlib import Path

from neon_files.downloads import ensure, fetch
from neon_files.errors import UserError, say
from neon_files.manifest import MANIFEST, ROOT


def obtain(path_or_url: str | Path) -> Path:
    """The local file. A published one that is missing is fetched into its place; every rank may call it.

    Raises UserError where there is neither a file nor a source for it.
    """
    try:
        return fetch(path_or_url)
    except UserError:
        entry = MANIFEST.entry(str(path_or_url))
        if entry is None:
            raise
    place = ROOT / entry.destination
    ensure(entry, place, say=say)
    return place
