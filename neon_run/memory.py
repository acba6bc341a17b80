"""Does a batch fit the memory of a GPU? Known before anything is sampled, from the peaks of the published networks.

`sampling_memory.json` is written by `benchmarks/memory.py`: number of parameters of a network -> in float32 and in half
precision, lines: GiB that are fixed, and GiB that each image adds. The peak of a batch is the largest of its lines'
values. They are computed from tensors; where more was measured on a GPU, "measured" has one line of that too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Backbone
from neon_files.errors import say
from neon_run.replay import Recorded

SAMPLING_MEMORY = Path(__file__).with_name("sampling_memory.json")
GIB = 2**30
Line = Sequence[float]  # GiB fixed, GiB an image
RESERVE = 1.0  # GiB left for workspaces of cuDNN and cuBLAS, and for fragmentation
RECORDED = 1.85  # times the peak is reserved where calls are recorded, which keep their memory: 1.5 to 1.84 on an H200


def peak(lines: Sequence[Line], batch_size: int) -> float:
    """GiB of a batch."""
    return max(fixed + each * batch_size for fixed, each in lines)


def largest_batch(lines: Sequence[Line], memory: float) -> int:
    """The most images whose peak lies within `memory` GiB; 0 or less where there is none."""
    return min(int((memory - fixed) // each) for fixed, each in lines)


def free_memory(device: torch.device) -> float | None:
    """GiB of the GPU that this process holds or may still get; None on a CPU, whose memory is not asked for."""
    if device.type != "cuda":
        return None
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB


def warn_of_large_batch(backbone: Backbone, settings: Mapping[str, Any], batch_size: int, device: torch.device) -> None:
    """One line with the batch that fits, where `batch_size` images at once will not. Networks without a measured peak
    pass in silence."""
    free = free_memory(device)
    if free is None:
        return
    known = json.loads(SAMPLING_MEMORY.read_text(encoding="utf-8"))
    entry = known.get(str(sum(p.numel() for p in backbone.net.parameters())))
    if entry is None:
        return
    half = backbone.precisions(**settings)["network"] != "fp32"
    kind = "half" if half else "fp32"
    measured = [entry["measured"][kind]] if kind in entry.get("measured", {}) else []
    factor = RECORDED if isinstance(getattr(backbone.net, "calls", None), Recorded) else 1.0
    lines = [[factor * part for part in line] for line in (*entry[kind], *measured)]
    need, fits = peak(lines, batch_size) + RESERVE, largest_batch(lines, free - RESERVE)
    if fits >= batch_size:
        return
    other = "leave --compile out" if factor > 1 else "use a larger GPU" + ("" if half else ", or --precision fp16")
    advice = f"--batch_size {fits} fits" if fits > 0 else f"no batch fits; {other}"
    say(f"warning: a batch of {batch_size} needs about {need:.1f} GiB, and {device} has {free:.1f} free; {advice}")
