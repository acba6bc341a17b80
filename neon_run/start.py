"""Where processes start. What they run is imported here, which takes seconds with PyTorch."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from types import ModuleType

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def imported(module: str) -> ModuleType:
    """The module. A Ctrl-C meanwhile ends the process at once, with status 130 and without a traceback.

    Nothing has begun that would have to be saved. An exception would not do: an interrupt inside of a C extension or
    of an import's clean-up is printed or turned into another error on its way.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored in a shell's job
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_stage(stage: str, package: str, preset: str | None = None) -> None:
    """Main function of a backbone's script: one of the four stages, with the commands of the backbone `package`."""
    backbone = imported(f"{package}.commands")
    imported("neon_run.commands").run_script(stage, backbone.COMMANDS, preset)
