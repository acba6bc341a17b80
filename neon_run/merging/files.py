"""Two checkpoint files of any container -> one merged file, a tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.merge import check_names, check_quantized
from neon_files.checkpoint import open_checkpoint, pack_metadata
from neon_files.containers import Weights
from neon_files.errors import UserError
from neon_files.safetensors_file import Layout, read_header
from neon_run.merging.lora import is_adapter
from neon_run.merging.rules import NEON, find_rule
from neon_run.merging.steps import Steps, as_steps
from neon_run.merging.weight_file import check_writable, is_torch_name, write_result


def merge_files(
    base: str | Path,
    syn: str | Path,
    w: float | Steps,
    out: str | Path,
    rule: str = NEON,
    entries: Sequence[str | None] = (None, None),
    dense: bool = False,
) -> Path:
    """Merge two checkpoints of any container into `out`, one tensor in memory at a time.

    `out` is a torch file where its suffix says so, else safetensors, whose header records the inputs with their
    hashes, w and the rule, and the base's configuration. `entries`: which state dict to take where a file holds
    several, in the base and in the other; `dense`: names that look like an adapter's are a network's. Raises
    UserError as `neon_merge`, for names and shapes before anything is written.
    """
    steps, apply, out = as_steps(w), find_rule(rule), Path(out)
    if rule != NEON:
        if not steps.plain:
            raise UserError(f"--rule {rule}: uses one w for all tensors; leave out --keep and --w PATTERN=W")
        steps = as_steps(steps, statistics=False)
    ends = tuple(open_checkpoint(path, entry) for path, entry in zip((base, syn), entries, strict=True))
    theta_base, theta_syn = ends = ends[0], ends[1].named_like(ends[0].loaders)
    check_output(out, *(end.path for end in ends))
    for end in ends:
        check_quantized(end.layout(), str(end.path))
        if not dense and is_adapter(end.loaders):
            raise UserError(
                f"{end.path}: looks like an adapter; `neon merge` merges adapters, with --dense as plain weights"
            )
    layouts = theta_base.layout(), theta_syn.layout()
    steps.check_used(layouts[0])
    moving = ({k: shape for k, (_, shape) in layout.items() if not steps.keeps(k)} for layout in layouts)
    check_names(apply, *moving)
    steps.say_kept(out, layouts[0])

    def merged(name: str) -> Tensor:
        tensor = theta_base.loaders[name]()
        if name not in theta_syn.loaders or steps.keeps(name):
            return tensor
        return apply(name, tensor, theta_syn.loaders[name](), steps.of(name))

    def merged_dtype(name: str) -> torch.dtype:
        if name not in theta_syn.loaders or steps.keeps(name):
            return layouts[0][name][0]
        base, syn = (torch.empty(0, dtype=layout[name][0]) for layout in layouts)
        return apply(name, base, syn, steps.of(name)).dtype

    layout: Layout = {name: (merged_dtype(name), shape) for name, (_, shape) in layouts[0].items()}
    if not is_torch_name(out):
        check_writable(out, layout)
    with torch.no_grad():
        write_result(out, layout, merged, _header(ends, steps, rule))
    return out


def check_output(out: Path, *inputs: Path) -> None:
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise UserError(f"-o {out}: is one of the inputs; name another file")


def _header(ends: Sequence[Weights], steps: Steps, rule: str) -> dict[str, str]:
    theta_base, _ = ends
    inputs: dict[str, Any] = {
        side: {"file": end.path.name, "sha256": end.sha256(), "metadata": end.metadata}
        for side, end in zip(("base", "synthetic"), ends, strict=True)
    }
    record = {"neon": {**steps.record(), "rule": rule, **inputs}}
    if theta_base.container == "safetensors":  # all entries: other libraries need some
        return {**read_header(theta_base.path)[1], **pack_metadata(None, record)}
    return pack_metadata(theta_base.config, {**theta_base.metadata, **record})
