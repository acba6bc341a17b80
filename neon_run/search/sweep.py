"""The grid over snapshot, w and settings of the sampler, in one process: networks loaded once and moved in place, the
same seeds at every setting, every finished point kept in a file for the next run.

    <out>/points/<snapshot>-w1.4-cfg2.7-n10000-<hash>.json
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neon_core.backbone import Backbone
from neon_core.distributed import agree, barrier, broadcast_object, file_hash, is_main, print0
from neon_core.merge import NeonWeights, check_w
from neon_core.seeds import format_seeds
from neon_files.checkpoint import read_state
from neon_files.errors import UserError
from neon_files.run_files import NUMBER, intact, read_record, write_record
from neon_files.tracking import track
from neon_metrics.evaluate import Evaluator
from neon_run.search.quick import Settings

POINT = {"snapshot": str, "w": NUMBER, "seeds": str, "fid": NUMBER}  # entries of a point's file
BASE = "base"  # the snapshot name of every point at w = 0: the base itself, whatever the snapshot
Measure = Callable[[str, float, Settings], float]  # snapshot, w, settings -> FID


def find_checkpoints(folder: str | Path, first: int = 0, last: float = math.inf) -> dict[str, Path]:
    """name -> file of the snapshots in a fine-tune's folder that have seen `first` to `last` images, in their order.

    Ours (`snapshot-<images>.safetensors`) and the official loops' (`network-snapshot-<kimg>.pkl`,
    `ar-ckpt-images_<n>.pth`, `checkpoint-checkpoint-<n>.pth`). Raises UserError where there is none.
    """
    patterns = {
        r"snapshot-(\d+)\.safetensors": 1,
        r"network-snapshot-(\d+)\.pkl": 1000,
        r"ar-ckpt-images_(\d+)\.pth": 1,
        r"checkpoint-checkpoint-(\d+)\.pth": 1,
    }
    snapshots = []
    for path in Path(folder).glob("*"):
        for pattern, unit in patterns.items():
            match = re.fullmatch(pattern, path.name)
            if match and max(first, 1) <= int(match[1]) * unit <= last:  # at 0 images it is the base
                snapshots.append((int(match[1]) * unit, path))
    if not snapshots:
        raise UserError(f"{folder}: no snapshots of {first} to {last:g} images in it; name the folder of a fine-tune")
    return {path.stem: path for _, path in sorted(snapshots)}


def early_stopped_grid(
    snapshots: Iterable[str],
    ws: Sequence[float],
    settings: Mapping[str, Sequence[float]],
    measure: Measure,
    tolerance: float = math.inf,
) -> tuple[str, float, Settings]:
    """The best (snapshot, w, settings) of the grid, by FID; for one snapshot after the other:

    a setting (guidance) is not raised further once it is worse than the best of its w by more than `tolerance`, nor w
    once the best of a w is worse than the best of the w before it by more than that (the official VAR and xAR sweeps).
    Further settings are loops within the first's. A point of infinite FID gave images that are not finite.
    """
    best: tuple[float, tuple] = (math.inf, ())

    def lowest(snapshot: str, w: float, chosen: Settings, names: Sequence[str]) -> float:
        """FID of the best values of `names`, the others being `chosen`."""
        nonlocal best
        if not names:
            fid = measure(snapshot, w, chosen)
            if not best[1] or fid < best[0]:
                best = (fid, (snapshot, w, chosen))
            return fid
        best_so_far = math.inf
        for value in settings[names[0]]:
            fid = lowest(snapshot, w, {**chosen, names[0]: value}, names[1:])
            if fid > best_so_far + tolerance:
                break
            best_so_far = min(best_so_far, fid)
        return best_so_far

    for snapshot in snapshots:
        before = math.inf
        for w in ws:
            best_of_w = lowest(snapshot, w, {}, list(settings))
            if best_of_w > before + tolerance:
                break
            before = best_of_w
    return best[1]


class Sweep:
    """Measured points of one base and its snapshots.

    `settings` are those of `backbone.sample` at every point, `identity` holds the rest that the numbers depend on (base
    file and hash). The backbone's network moves; `restore` puts the base back. Every rank makes the same calls.
    """

    def __init__(
        self,
        backbone: Backbone,
        evaluator: Evaluator,
        snapshots: Mapping[str, Path],
        out_dir: str | Path,
        *,
        settings: Mapping[str, Any],
        batch_size: int,
        identity: Mapping[str, Any],
    ):
        self.backbone, self.evaluator, self.snapshots = backbone, evaluator, dict(snapshots)
        self.out_dir, self.settings, self.batch_size = Path(out_dir), dict(settings), batch_size
        agree("snapshots", lambda: {name: os.path.getsize(path) for name, path in snapshots.items() if path.exists()})
        self.identity = {
            **identity,
            "batch_size": batch_size,
            "reference": evaluator.reference.digest,
            **({"heldout": evaluator.heldout.digest} if evaluator.heldout else {}),
            "detector": evaluator.detector.name,
            "metrics": list(evaluator.metrics),
        }
        # On the host: a network, its two ends and a batch's caches together would not fit the largest row's card.
        self.theta_base = {name: value.detach().cpu().clone() for name, value in backbone.net.state_dict().items()}
        self._weights: NeonWeights | None = None
        self._at: str | None = None
        self._hashes: dict[str, str] = {}

    def measure(self, snapshot: str, w: float, seeds: Sequence[int], **varied: Any) -> dict[str, Any]:
        """The metrics at one point, measured earlier or now; `varied` replaces entries of `settings`."""
        check_w(w)
        snapshot = BASE if w == 0 else snapshot
        settings = {**self.settings, **varied}
        identity = {"snapshot": snapshot, "w": w, "settings": settings, "seeds": format_seeds(seeds), **self.identity}
        if snapshot != BASE:
            identity["snapshot_sha256"] = self._hash(snapshot)
        path = self._path(identity, varied, len(seeds))
        point = self._earlier(path)
        if point is None:
            self.move(snapshot, w)
            result = self.evaluator(
                self.backbone,
                seeds,
                settings=settings,
                batch_size=self.batch_size,
                work_dir=self.out_dir / "partial",
                identity=identity,
                infinite=True,
            )
            point = json.loads(json.dumps({**identity, **result}, default=str))
            if is_main():
                write_record(path, point)
            self.evaluator.clear()
            barrier()
        text = "".join(f" | {name}={value}" for name, value in varied.items())
        track({f"search/FID of {snapshot}{text}, over 1000 w": point["fid"]}, round(1000 * w))
        print0(f"{snapshot} | w={w:g}{text} | images={len(seeds)} | FID={point['fid']:.6f}")
        return point

    def move(self, snapshot: str, w: float) -> None:
        """Put the network at theta_base - w (theta_syn - theta_base)."""
        if snapshot == BASE or w == 0:
            self.restore()
            return
        if self._at != snapshot or self._weights is None:
            self._weights = None  # before the next is read: one pair in memory at a time
            theta_syn = read_state(self.snapshots[snapshot], self.theta_base)
            self._weights = NeonWeights(self.backbone.net, self.theta_base, theta_syn)
            self._at = snapshot
        self._weights.set(w)

    def restore(self) -> None:
        """Put the base back, bit for bit."""
        if self._weights is not None:
            self._weights.set(0)

    def _earlier(self, path: Path) -> dict[str, Any] | None:
        """A point measured earlier, on every rank."""
        return broadcast_object(intact(path, read_record, POINT) if is_main() else None)

    def _hash(self, snapshot: str) -> str:
        if snapshot not in self._hashes:
            self._hashes[snapshot] = file_hash(self.snapshots[snapshot])
        return self._hashes[snapshot]

    def _path(self, identity: Mapping[str, Any], varied: Mapping[str, Any], count: int) -> Path:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
        text = "".join(f"-{name}{value}" for name, value in varied.items())
        return self.out_dir / "points" / f"{identity['snapshot']}-w{identity['w']:g}{text}-n{count}-{key}.json"
