"""The `neon` command: `python -m neon_run`, and what an installed `neon` calls."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """PyTorch is imported only here, which takes seconds: a Ctrl-C meanwhile ends without a traceback."""
    try:
        command = importlib.import_module("neon_run.command")
    except KeyboardInterrupt:
        sys.exit(130)
    command.main()


if __name__ == "__main__":
    main()
