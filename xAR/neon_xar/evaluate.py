"""FID of a checkpoint, and the search over snapshot, w and guidance with the weights moved in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neon_core.distributed import file_hash
from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_run.cli import measured_line
from neon_run.search.sweep import BASE, Sweep, early_stopped_grid
from neon_xar.backbone import XARBackbone


def result_line(result: dict[str, Any]) -> str:
    """`FID=1.0200 | IS=300.0000±2.0000 | cfg=2.7 | ...` as officially, and behind it what else was measured."""
    settings = result["settings"]
    parts = [f"cfg={settings['cfg']:g}", f"steps={settings['flow_steps']}", f"n={result['num_images']}"]
    parts += [f"model={result['model']}"] if "model" in result else []
    parts += [f"w={result['w']:g}"] if "w" in result else []
    parts.append(f"ckpt={result.get('checkpoint') or result['snapshot']}")
    return measured_line(result, parts)


def check_model(backbone: XARBackbone, img_size: int | None, class_num: int | None) -> None:
    """UserError where a flag says otherwise than the model."""
    if img_size is not None and img_size != backbone.img_size:
        raise UserError(
            f"--img_size {img_size}: this model makes {backbone.img_size} x {backbone.img_size} images only"
        )
    if class_num is not None and class_num != backbone.num_classes:
        raise UserError(f"--class_num {class_num}: this model has {backbone.num_classes} classes")


def neighbours(w: float, cfg: float, step: float = 0.1) -> list[tuple[float, float]]:
    """The eight points around (w, cfg) that are positive in both."""
    around = [(round(w + i * step, 6), round(cfg + j * step, 6)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [(a, b) for a, b in around if (a, b) != (w, cfg) and a > 0 and b > 0]


def sweep(
    backbone: XARBackbone,
    evaluator: Evaluator,
    base: Path,
    snapshots: Mapping[str, Path],
    out_dir: Path,
    *,
    ws: Sequence[float],
    cfgs: Sequence[float],
    seeds: Sequence[int],
    final_seeds: Sequence[int] | None = None,
    tolerance: float = math.inf,
    refine: bool = False,
    settings: dict[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """The best point of every snapshot and over all of them, as JSON; the best network is <out_dir>/neon.safetensors.

    Searched as officially: for each snapshot the early-stopped grid, then, with `refine`, the neighbours of its best
    point. `backbone` holds theta_base and does so again afterwards. Every rank calls it.
    """
    identity = {"base_sha256": file_hash(base), "autoencoder": backbone.prepared_key}
    runner = Sweep(backbone, evaluator, snapshots, out_dir, settings=settings, batch_size=batch_size, identity=identity)
    bests = []
    for snapshot in snapshots:
        measured: list[dict[str, Any]] = []

        def fid(snapshot: str, w: float, cfg: float, measured=measured) -> float:
            measured.append(runner.measure(snapshot, w, seeds, cfg=cfg))
            return measured[-1]["fid"]

        _, w, cfg = early_stopped_grid([snapshot], sorted(ws), sorted(cfgs), fid, tolerance)
        for around in neighbours(w, cfg) if refine else ():
            fid(snapshot, *around)
        bests.append(min(measured, key=lambda result: result["fid"]))
    best = min(bests, key=lambda result: result["fid"])
    out = {"best": best, "best_of_each": dict(zip(snapshots, bests, strict=True))}
    if best["snapshot"] != BASE:
        out["network"] = str(runner.write(base, best["snapshot"], best["w"]))
    if final_seeds is not None:
        out["final"] = runner.measure(best["snapshot"], best["w"], final_seeds, cfg=best["settings"]["cfg"])
    runner.restore()
    return out
