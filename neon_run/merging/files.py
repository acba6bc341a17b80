"""Two checkpoint files of any container -> one merged safetensors file, a tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from neon_core.merge import check_names, check_w
from neon_files.atomic import sha256_file
from neon_files.checkpoint import open_checkpoint, pack_metadata
from neon_files.errors import UserError
from neon_files.safetensors_file import read_header, write_safetensors
from neon_run.merging.rules import find_rule


def merge_files(base: str | Path, syn: str | Path, w: float, out: str | Path, rule: str = "neon") -> Path:
    """Merge two checkpoints of any container into the safetensors file `out`, one tensor in memory at a time.

    The header of `out` records the inputs with their hashes, w and the rule, and the base's configuration. Raises
    UserError as `neon_merge`, before anything is written wherever names and shapes tell.
    """
    check_w(w)
    apply = find_rule(rule)
    out = Path(out)
    theta_base, theta_syn = open_checkpoint(base), open_checkpoint(syn)
    for end in (theta_base, theta_syn):
        if out.exists() and out.samefile(end.path):
            raise UserError(f"-o {out}: is one of the inputs; name another file")
    layouts = theta_base.layout(), theta_syn.layout()
    check_names(apply, *({name: shape for name, (_, shape) in layout.items()} for layout in layouts))

    def merged(name: str) -> Tensor:
        tensor = theta_base.loaders[name]()
        return apply(name, tensor, theta_syn.loaders[name](), w) if name in theta_syn.loaders else tensor

    def merged_dtype(name: str) -> torch.dtype:
        if name not in theta_syn.loaders:
            return layouts[0][name][0]
        return apply(name, *(torch.empty(0, dtype=layout[name][0]) for layout in layouts), w).dtype

    layout = {name: (merged_dtype(name), shape) for name, (_, shape) in layouts[0].items()}
    inputs = {
        side: {"file": end.path.name, "sha256": sha256_file(end.path), "metadata": end.metadata}
        for side, end in (("base", theta_base), ("synthetic", theta_syn))
    }
    record = {"neon": {"w": w, "rule": rule, **inputs}}
    if theta_base.container == "safetensors":  # entries as they are: other libraries look for some
        metadata = {**read_header(theta_base.path)[1], **pack_metadata(None, record)}
    else:
        metadata = pack_metadata(theta_base.config, {**theta_base.metadata, **record})
    with torch.no_grad():
        write_safetensors(out, layout, merged, metadata)
    return out
