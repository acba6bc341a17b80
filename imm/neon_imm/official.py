"""What the official scripts do otherwise: their merge, and their command line of key=value words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neon_files.errors import UserError


def merge_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The official merge: floating tensors, only the entries that are finite in both."""
    if not base.is_floating_point() or w == 0:
        return base.clone()
    syn = syn.to(base.dtype)
    return torch.where(torch.isfinite(base) & torch.isfinite(syn), base - w * (syn - base), base)


# The official script is configured as key=value; these are the keys that have a flag here.
OVERRIDES = {
    "eval.resume": "--model_ckpt",
    "aux_resume": "--synthetic",
    "neon_w": "--w",
    "per_class_count": "--per_class_count",
    "total_images": "--num_images",
    "fid_stats": "--fid_stats",
    "preset": "--preset",
    "cfg_scale": "--cfg",
    "eval.batch_size": "--batch_size",
    "out_dir": "--out_dir",
}
IMAGES_DIR = "--save_images"  # what `out_dir` means to the official evaluation


def official_arguments(stage: str, arguments: Sequence[str]) -> list[str]:
    """`arguments` of a stage's script with hydra's key=value overrides as flags. UserError names one that has no
    counterpart."""
    flags = OVERRIDES | ({"out_dir": IMAGES_DIR} if stage == "calculate_fid" else {})
    found: list[str] = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("+").partition("=")
        follows_flag = bool(found) and found[-1].startswith("-") and "=" not in found[-1]
        if key == "--config-name":
            if "im256" not in value:
                raise UserError(f"{argument}: only the 256 configuration is known; use --preset")
        elif argument.startswith("-") or not equals or follows_flag:
            found.append(argument)
        elif key in flags:
            found.append(f"{flags[key]}={value}")
        else:
            raise UserError(f"{argument}: this override has no counterpart; known are {', '.join(flags)}")
    return found
