"""Golden numbers: what tiny networks of every backbone, and the metrics, give in float32 on this device, against what
they gave on a CPU.

Weights, inputs and noise come from `numbers`, so the random numbers of this version of torch have no part in it.
`python -m neon_run.check.golden` records the files anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.precision import float32_precision
from neon_files.atomic import atomic_path
from neon_metrics.detector import InceptionDetector
from neon_metrics.inception import InceptionV3
from neon_metrics.neighbours import prdc
from neon_metrics.reference import Reference
from neon_metrics.scores import fid_from_features, kid
from neon_metrics.statistics import FeatureStatistics
from neon_run.backbones import find_backbones
from neon_run.check.numbers import fill, normal
from neon_run.check.parts import CheckParts, Outputs

LIMIT = 1e-4  # of a difference, over the largest value of the output: TF32 and half precision are beyond it
KEPT = 24  # values of an output in a file


def metrics(device: torch.device) -> Outputs:
    """Inception's features of two images behind the TF1 resize; FID, KID, and precision to coverage of 40 points."""
    detector = InceptionDetector(fill(InceptionV3()), "check", official=False, device=device)
    pixels = torch.from_numpy(normal("pixels", (2, 3, 40, 48)) * 50 + 128).clamp(0, 255).to(torch.uint8)
    real, generated = (torch.from_numpy(normal(name, (40, 8))).to(device) for name in ("real", "generated"))
    reference = Reference.from_statistics(FeatureStatistics(8, device).update(real))
    scores = prdc(real=real, generated=generated + 0.3, k=3)
    numbers = [
        fid_from_features(generated + 0.3, reference),
        *kid(generated=generated + 0.3, real=real, subsets=3, subset_size=20),
        *(scores.precision, scores.recall, scores.density, scores.coverage),
    ]
    return {"features": detector(pixels)["features"], "scores": torch.tensor(numbers, dtype=torch.float64)}


METRICS = (metrics, Path(__file__).with_name("metrics.json"))


def differences(device: torch.device) -> dict[str, float]:
    """ "metrics features" and the like -> the largest difference, over the largest value recorded."""
    found = {}
    for group, tiny, file in _groups():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        with float32_precision("none"):
            outputs = summaries(tiny(device))
        for name, values in recorded.items():
            ours = torch.tensor(outputs[name], dtype=torch.float64)
            theirs = torch.tensor(values, dtype=torch.float64)
            difference = (ours - theirs).abs().max() / theirs.abs().max()
            found[f"{group} {name}"] = float(difference) if difference.isfinite() else math.inf
    return found


def summaries(outputs: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Of each output its root mean square and up to KEPT values, evenly spread."""
    kept = {}
    for name, output in outputs.items():
        flat = output.detach().flatten().double().cpu()
        places = torch.linspace(0, len(flat) - 1, min(KEPT, len(flat))).round().long()
        kept[name] = [float(flat.square().mean().sqrt()), *flat[places].tolist()]
    return kept


def _groups() -> Iterator[tuple[str, Any, Path]]:
    yield "metrics", *METRICS
    for commands in find_backbones():
        if commands.machine_check is not None:
            parts: CheckParts = commands.machine_check
            yield commands.name, parts.tiny, parts.recorded


def record() -> None:
    """Write every file from this machine's CPU."""
    for _, tiny, file in _groups():
        rounded = {name: [float(f"{value:.8g}") for value in values]
                   for name, values in summaries(tiny(torch.device("cpu"))).items()}  # fmt: skip
        with atomic_path(file) as temporary:
            lines = (f" {json.dumps(name)}: {json.dumps(values)}" for name, values in rounded.items())
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    record()
