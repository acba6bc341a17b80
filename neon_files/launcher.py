"""The launcher that started this process (torchrun, or one that sets the same variables): its environment, its end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from neon_files.errors import UserError

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 30.0  # seconds between the launcher's end and ours, at most; torchrun waits as long


def is_launched() -> bool:
    """Whether a launcher started this process. Raises UserError where its environment is not complete."""
    given = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    if not given["RANK"]:
        if given["WORLD_SIZE"] not in ("", "1"):
            raise UserError(
                f"WORLD_SIZE is {given['WORLD_SIZE']} but RANK is not set; start with torchrun, or unset WORLD_SIZE"
            )
        return False
    missing = [name for name, value in given.items() if not value]
    numbers = [name for name in ENVIRONMENT if name != "MASTER_ADDR"]
    if missing:
        refuse(f"RANK is set but {', '.join(missing)} is not; start with torchrun, or unset RANK")
    for name in (*numbers, "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            refuse(f"{name} is {os.environ[name]!r}, not a number; start with torchrun")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        refuse(f"RANK is {given['RANK']} of WORLD_SIZE {given['WORLD_SIZE']}; ranks count from 0; start with torchrun")
    return True


def refuse(message: str) -> None:
    """Print the error and exit; for a process that cannot agree with the other ranks on who prints."""
    UserError(message).show()
    sys.exit(UserError.exit_code)


def end_with_launcher() -> None:
    """Ask this process to stop when torchrun has ended: one that was killed sends its workers no signal."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    program = Path(sys.argv[0])
    target = ["-m", program.parent.name] if program.name == "__main__.py" else [sys.argv[0]]
    if "RANK" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", *target]
    else:
        start = ["python", *target] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])
