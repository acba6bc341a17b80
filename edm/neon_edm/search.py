"""theta_base and the snapshots of theta_syn -> the best theta_neon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neon_core.distributed import barrier, broadcast_object, is_main
from neon_core.evaluate import Evaluator
from neon_core.files.atomic import sha256_file
from neon_core.files.checkpoint import read_checkpoint
from neon_core.merge import NeonWeights, merge_files
from neon_core.seeds import format_seeds
from neon_edm.backbone import EDMBackbone, local_file
from neon_edm.grid import find_snapshots, search_grid
from neon_edm.report import result_line


def sweep(
    base: str | Path,
    snapshots: str | Path,
    reference: str | Path,
    out_dir: Path,
    *,
    weights: Sequence[float],
    seeds_test: Sequence[int],
    seeds: Sequence[int],
    settings: dict[str, Any],
    batch_size: int,
    device: torch.device,
    metrics: Sequence[str] = ("fid",),
    detector: str | Path | None = None,
    real_images: str | Path | None = None,
    min_training_step: int = 51,
    max_training_step: int = 10_000,
    stop_rise: float | None = None,
    final: bool = True,
) -> dict[str, Any]:
    """All points of the grid on `seeds_test`, and the best one evaluated on `seeds`, as JSON with a result "line".

    Every rank calls it. Raises UserError before anything is sampled where an input is missing or does not fit.
    """
    found = find_snapshots(snapshots, min_training_step, max_training_step)
    metrics = tuple(dict.fromkeys(("fid", *metrics)))
    evaluator = Evaluator(reference, device=device, metrics=metrics, detector=detector, real_images=real_images)
    path = local_file(base)
    backbone = EDMBackbone.load(path, None, device)
    identity = {
        "base_sha256": broadcast_object(sha256_file(path) if is_main() else None),
        "settings": settings,
        "batch_size": batch_size,
        "metrics": metrics,
        "reference": evaluator.reference.name,
        "detector": evaluator.detector.name,
    }

    def evaluate(numbers: Sequence[int]) -> dict[str, Any]:
        return evaluator(backbone, numbers, settings=settings, batch_size=batch_size)

    points = search_grid(
        backbone,
        list(found.values()),
        weights,
        lambda: evaluate(seeds_test),
        out_dir,
        identity=identity | {"seeds": format_seeds(seeds_test)},
        stop_rise=stop_rise,
    )
    best = min(points, key=lambda point: point.fid)
    by_name = {file.name: file for file in found.values()}
    out = {
        "base": str(path),
        "points": [{"snapshot": point.snapshot, "w": point.w, **point.result} for point in points],
        "best": {"snapshot": best.snapshot, "w": best.w, "fid_test": best.fid},
    }
    line = f"best: snapshot={best.snapshot or 'base'} | w={best.w:g} | FID_test={best.fid:.6f}"
    if best.snapshot is not None:
        theta_syn = by_name[best.snapshot]
        neon = out_dir / "neon.safetensors"
        if is_main():
            merge_files(path, theta_syn, best.w, neon)
        barrier()
        out["best"]["network"] = str(neon)
        if final:
            NeonWeights(backbone.net, backbone.net.state_dict(), read_checkpoint(theta_syn).state, device).set(best.w)
    if final:
        out["best"]["final"] = evaluate(seeds)
        line += " | " + result_line(out["best"]["final"], backbone.num_classes)
    return out | {"line": line}
