"""FID of a checkpoint, and the search over snapshot, w and guidance with the weights moved in place."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neon_core.distributed import barrier, broadcast_object, is_main, print0
from neon_core.errors import UserError
from neon_core.evaluate import Evaluator
from neon_core.files.atomic import sha256_file, write_json
from neon_core.files.checkpoint import find_file, read_checkpoint
from neon_core.merge import NeonWeights, check_w, merge_files
from neon_core.selftrain import find_snapshots
from neon_xar.backbone import XARBackbone


def result_line(result: dict[str, Any]) -> str:
    """`FID=1.0200 | IS=300.0000±2.0000 | cfg=2.7 | ...` as officially, and behind it what else was measured."""
    parts = [f"FID={result['fid']:.4f}"] if "fid" in result else []
    if "is_mean" in result:
        parts.append(f"IS={result['is_mean']:.4f}±{result['is_std']:.4f}")
    settings = result["settings"]
    parts += [f"cfg={settings['cfg']:g}", f"steps={settings['flow_steps']}", f"n={result['num_images']}"]
    parts += [f"model={result['model']}"] if "model" in result else []
    parts += [f"w={result['w']:g}"] if "w" in result else []
    parts.append(f"ckpt={result['checkpoint']}")
    more = ("kid_mean", "precision", "recall", "density", "coverage")
    parts += [f"{name.removesuffix('_mean').upper()}={result[name]:.4f}" for name in more if name in result]
    return " | ".join(parts if result["detector_is_official"] else [*parts, f"detector={result['detector']}"])


def check_model(backbone: XARBackbone, img_size: int | None, class_num: int | None) -> None:
    """UserError where a flag says otherwise than the model."""
    if img_size is not None and img_size != backbone.img_size:
        raise UserError(
            f"--img_size {img_size}: this model makes {backbone.img_size} x {backbone.img_size} images only"
        )
    if class_num is not None and class_num != backbone.num_classes:
        raise UserError(f"--class_num {class_num}: this model has {backbone.num_classes} classes")


def early_stopped_grid(
    ws: Sequence[float], cfgs: Sequence[float], fid: Callable[[float, float], float], tolerance: float = math.inf
) -> tuple[float, float]:
    """The best (w, cfg) of two ascending grids, searched as officially.

    Guidance is not raised further once FID exceeds the best of this w by more than `tolerance`, nor w once the best of
    a w exceeds the best of the w before by more. An infinite tolerance tries everything.
    """
    best, before = (math.inf, math.nan, math.nan), math.inf
    for w in ws:
        best_here = math.inf
        for cfg in cfgs:
            value = fid(w, cfg)
            best = min(best, (value, w, cfg))
            if value > best_here + tolerance:
                break
            best_here = min(best_here, value)
        if best_here > before + tolerance:
            break
        before = best_here
    return best[1], best[2]


def neighbours(w: float, cfg: float, step: float = 0.1) -> list[tuple[float, float]]:
    """The eight points around (w, cfg) that are positive in both."""
    around = [(round(w + i * step, 6), round(cfg + j * step, 6)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [(a, b) for a, b in around if (a, b) != (w, cfg) and a > 0 and b > 0]


class Sweep:
    """Measures points of (snapshot, w, cfg) on common seeds; each is kept as a file, and not made again.

    <out_dir>/<images seen>/cfg=2.700_w=1.600.json      the official layout; w = 0 is the base, under <out_dir>/base
    """

    def __init__(
        self,
        backbone: XARBackbone,
        evaluator: Evaluator,
        snapshots: dict[int, Path],
        out_dir: Path,
        *,
        settings: dict[str, Any],
        batch_size: int,
        identity: dict[str, Any],
    ):
        """`identity`: hashes of everything that `settings` do not say (base, autoencoder, reference)."""
        self.backbone, self.evaluator, self.snapshots, self.out_dir = backbone, evaluator, snapshots, out_dir
        self.settings, self.batch_size, self.identity = settings, batch_size, identity
        self.theta_base = {name: value.clone() for name, value in backbone.net.state_dict().items()}
        self._loaded: int | None = None
        self._weights: NeonWeights | None = None

    def point(self, images_seen: int, w: float, cfg: float, seeds: Sequence[int]) -> dict[str, Any]:
        """The result at one setting, measured now or found. Every rank calls it. Raises UserError where a file of that
        name was measured under other settings."""
        check_w(w)
        settings = {**self.settings, "cfg": cfg}
        folder = self.out_dir / (str(images_seen) if w else "base")
        path = folder / f"cfg={cfg:.3f}_w={w:.3f}{'' if len(seeds) == 10_000 else f'_n={len(seeds)}'}.json"
        identity = {
            **self.identity,
            "snapshot": str(self.snapshots[images_seen]) if w else None,
            "w": w,
            "settings": settings,
            "seeds": [min(seeds), max(seeds), len(seeds)],
            "batch_size": self.batch_size,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        found = broadcast_object(json.loads(path.read_text()) if is_main() and path.exists() else None)
        if found is not None and found.get("key") != key:
            raise UserError(f"{path}: measured with another base, snapshot, seeds or settings; name another --out_dir")
        if found is None:
            self.move(images_seen, w)
            options = {"work_dir": self.out_dir / "partial", "identity": identity, "progress": False}
            found = self.evaluator(self.backbone, seeds, settings=settings, batch_size=self.batch_size, **options)
            found |= {"w": w, "key": key, "images_seen": images_seen if w else 0}
            found["checkpoint"] = self.snapshots[images_seen].stem if w else "base"
            if is_main():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, json.loads(json.dumps(found, default=str)))
            barrier()
        print0(result_line(found))
        return found

    def move(self, images_seen: int, w: float) -> None:
        """Set the backbone's weights to theta_base - w (theta_syn - theta_base)."""
        if self._loaded != images_seen:
            theta_syn = read_checkpoint(self.snapshots[images_seen]).state
            self._weights, self._loaded = NeonWeights(self.backbone.net, self.theta_base, theta_syn), images_seen
        self._weights.set(w)

    def search(
        self,
        images_seen: int,
        ws: Sequence[float],
        cfgs: Sequence[float],
        seeds: Sequence[int],
        *,
        tolerance: float = math.inf,
        refine: bool = False,
    ) -> dict[str, Any]:
        """The best point of one snapshot: the grid, then, with `refine`, the neighbours of its best point."""
        results: dict[tuple[float, float], dict[str, Any]] = {}

        def fid(w: float, cfg: float) -> float:
            results[w, cfg] = self.point(images_seen, w, cfg, seeds)
            return results[w, cfg]["fid"]

        best = early_stopped_grid(sorted(ws), sorted(cfgs), fid, tolerance)
        if refine:
            for w, cfg in neighbours(*best):
                fid(w, cfg)
        return min(results.values(), key=lambda result: result["fid"])


def images_seen(path: Path) -> int:
    """The number that a snapshot's name ends with, ours or official (`checkpoint-checkpoint-250112.pth`)."""
    digits = re.search(r"(\d+)$", path.stem)
    if not digits:
        raise UserError(f"{path}: the name of a snapshot must end with the number of images seen")
    return int(digits[1])


def sweep(
    backbone: XARBackbone,
    evaluator: Evaluator,
    base: Path,
    snapshots: Sequence[Path] | Path | None,
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

    `backbone` holds theta_base and does so again afterwards. Every rank calls it.
    """
    if isinstance(snapshots, Path):
        found = find_snapshots(snapshots)
    else:
        found = {images_seen(path): find_file(path) for path in snapshots or ()}
    if not found:
        raise UserError(
            f"{snapshots}: no snapshots there" if snapshots else "--snapshots or --model_ckpt_aux is missing"
        )
    identity = {"base_sha256": sha256_file(base), "autoencoder": backbone.prepared_key, "metrics": evaluator.metrics}
    identity |= {"reference": evaluator.reference.name, "detector": evaluator.detector.name}
    runner = Sweep(
        backbone, evaluator, found, Path(out_dir), settings=settings, batch_size=batch_size, identity=identity
    )
    options = {"tolerance": tolerance, "refine": refine}
    bests = [runner.search(number, ws, cfgs, seeds, **options) for number in found]
    best = min(bests, key=lambda result: result["fid"])
    out = {"best": best, "best_of_each": bests}
    number, w = best["images_seen"], best["w"]
    if w:
        if is_main():
            merge_files(base, found[number], w, Path(out_dir) / "neon.safetensors")
        barrier()
        out["network"] = str(Path(out_dir) / "neon.safetensors")
    if final_seeds is not None:
        out["final"] = runner.point(number or next(iter(found)), w, best["settings"]["cfg"], final_seeds)
    runner.move(number or next(iter(found)), 0.0)
    return out
