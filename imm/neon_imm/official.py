"""Rules of the official scripts: their merge, and their command line of key=value words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neon_files.errors import UserError, say


def merge_rule(name: str, base: Tensor, syn: Tensor, w: float) -> Tensor:
    """The official merge: floating tensors, only the entries that are finite in both."""
    if not base.is_floating_point() or w == 0:
        return base.clone()
    syn = syn.to(base.dtype)
    return torch.where(torch.isfinite(base) & torch.isfinite(syn), base - w * (syn - base), base)


# The official scripts are configured as key=value: those with a flag, by stage.
_SAMPLING = {"preset": "--preset", "cfg_scale": "--cfg", "eval.batch_size": "--batch_size"}
_COUNTS = {"per_class_count": "--per_class", "total_images": "--num_images"}
_MERGE = {"aux_resume": "--synthetic", "neon_w": "--w", "fid_stats": "--fid_stats"}
KEYS = {
    "generate": {"eval.resume": "--network", "out_dir": "--outdir", **_COUNTS, **_SAMPLING},
    "finetune": {"training.transfer": "--base", "dataset.path": "--data"},
    "sweep": {"eval.resume": "--base", "out_dir": "--out_dir", **_MERGE, **_SAMPLING},
    # `out_dir` is where the official evaluation writes its images
    "calculate_fid": {"eval.resume": "--model_ckpt", "out_dir": "--save_images", **_COUNTS, **_MERGE, **_SAMPLING},
}
WITHOUT_EFFECT = ("eval.cudnn_benchmark", "dataset.cache", "logger.project")
ADVICE = {  # keys of another meaning, and parts of a file
    "eval.seed": "every image has a separate seed; give --seed, that of the first one",
    "fid_out": "give --json, a file of the result and every setting",
    "outputdir": "give --outdir, the folder of this fine-tune itself",
    "network.": "the network is rebuilt from its checkpoint; leave it out",
    "encoder.": "give --vae, the autoencoder's folder, file or hub name",
    "training.": "give --images, --batch_size, --lr or another flag that --help lists",
    "per_class_count": "give --num_images, of every point of the search",
    "total_images": "give --num_images, of every point of the search",
}


def official_arguments(stage: str, arguments: Sequence[str]) -> list[str]:
    """`arguments` of a stage's script with the official key=value words as flags. UserError names one that has no
    counterpart, and the replacement."""
    flags = KEYS[stage]
    translated: list[str] = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("+").partition("=")
        follows_flag = bool(translated) and translated[-1].startswith("-") and "=" not in translated[-1]
        if key == "--config-name":
            if "im256" not in value:
                raise UserError(f"{argument}: only the 256 configuration is supported; use --preset")
        elif argument.startswith("-") or not equals or follows_flag:
            translated.append(argument)
        elif key in flags:
            translated.append(f"{flags[key]}={value}")
        elif key in WITHOUT_EFFECT:
            say(f"{argument}: not used")
        else:
            supported = ", ".join(f"{name} ({flag})" for name, flag in flags.items())
            fitting = [text for name, text in ADVICE.items() if key == name or (name[-1] == "." and name in key)]
            raise UserError(
                f"{argument}: {fitting[0] if fitting else f'has no counterpart; supported are {supported}'}"
            )
    return translated
