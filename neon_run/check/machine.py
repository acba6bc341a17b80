"""What there is: device, driver, versions, the speed of products in each precision, and a sum over all ranks."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from neon_core.distributed import all_reduce_, barrier, rank, world_size
from neon_core.precision import PRECISIONS, float32_precision
from neon_core.seeds import PerImageRandom
from neon_files.errors import UserError, one_line

SUM_ELEMENTS = 1 << 22  # float32: 16 MiB
REPEATS = 5


def facts(device: torch.device) -> dict[str, Any]:
    """Of this rank: names and versions, JSON."""
    found: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": sys.platform,
        "draws": draws(device),
    }
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return found | {"name": _processor(), "vectors": capability, "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(device)
    return found | {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_bytes": card.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "bf16": torch.cuda.is_bf16_supported(),
        "tf32": card.major >= 8,
    }


def _processor() -> str:
    """The name of the CPU, where the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of the driver; None where its tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def draws(device: torch.device) -> str:
    """Digest of what seed 0 draws: equal seeds give equal noise where it is equal, in versions of torch and devices."""
    random = PerImageRandom([0], device)
    drawn = (random.randn(64), random.rand(64), random.exponential(64), random.randint(1 << 30))
    return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in drawn)).hexdigest()[:8]


def products(device: torch.device) -> dict[str, float | str]:
    """Precision -> 10^12 operations a second of a matrix product, or why there is none; on a GPU with "tf32"."""
    side = 8192 if device.type == "cuda" else 512
    kinds = {name: (dtype, "none") for name, dtype in PRECISIONS.items()}
    if device.type == "cuda":
        kinds["tf32"] = (torch.float32, "all")
    found: dict[str, float | str] = {}
    for name, (dtype, tf32) in kinds.items():
        try:
            x = torch.ones(side, side, dtype=dtype, device=device)
            with float32_precision(tf32):
                x @ x
                wait(device)
                began = time.monotonic()
                for _ in range(REPEATS):
                    x @ x
                wait(device)
            found[name] = REPEATS * 2 * side**3 / (time.monotonic() - began) / 1e12
        except RuntimeError as error:
            found[name] = one_line(error)
    return found


def collective(device: torch.device) -> dict[str, Any]:
    """{"ranks", "bytes", "seconds"} of a sum over all ranks; {"ranks"} of one. UserError where the sum is wrong."""
    ranks = world_size()
    if ranks == 1:
        return {"ranks": 1}
    x = torch.full((SUM_ELEMENTS,), rank() + 1.0, device=device)
    total = float(all_reduce_(x)[-1])
    expected = ranks * (ranks + 1) / 2
    if total != expected:
        raise UserError(f"a sum over {ranks} ranks gave {total:g} instead of {expected:g}; check NCCL and the network")
    barrier()
    wait(device)
    began = time.monotonic()
    for _ in range(REPEATS):
        all_reduce_(x)
    wait(device)
    return {"ranks": ranks, "bytes": 4 * SUM_ELEMENTS, "seconds": (time.monotonic() - began) / REPEATS}


def wait(device: torch.device) -> None:
    """Until it has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
