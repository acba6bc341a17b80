"""Where published files are kept on this machine, and the command that fetches them there."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]  # the repository; site-packages where the package is installed
SCRIPT = "download_models.sh"


def is_checkout() -> bool:
    return (CHECKOUT / SCRIPT).is_file()


def home() -> Path:
    """The folder that holds `checkpoints/` and `fid_stats/`: NEON_HOME, else the checkout, else the user's cache."""
    if os.environ.get("NEON_HOME"):
        return Path(os.environ["NEON_HOME"]).expanduser().absolute()
    return CHECKOUT if is_checkout() else user_cache()


def cache_dir() -> Path:
    """Where files of other URLs are kept: NEON_CACHE_DIR, else NEON_HOME, else the user's cache."""
    chosen = os.environ.get("NEON_CACHE_DIR") or os.environ.get("NEON_HOME")
    return Path(chosen).expanduser().absolute() if chosen else user_cache()


def user_cache() -> Path:
    """The folder `neon` in this platform's place for caches."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "neon"


def download_command(*words: str) -> str:
    """The command that fetches rows or files: of the checkout, or of the installed package."""
    return shlex.join([*(("bash", SCRIPT) if is_checkout() else ("neon", "download")), *words])
