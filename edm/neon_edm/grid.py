"""The grid over snapshots and w: every point is the base network moved in place and evaluated with the same noise.

<out>/base.json                     w = 0, which all snapshots share
<out>/<snapshot>/w=0.5.json         one file per finished point; found and kept by the next run
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, is_main, print0
from neon_core.errors import UserError
from neon_core.files.atomic import atomic_path, sha256_file
from neon_core.files.checkpoint import read_checkpoint
from neon_core.merge import NeonWeights, check_w

Evaluate = Callable[[], dict[str, Any]]  # of the network as it stands, on every rank; holds "fid"


@dataclass(frozen=True)
class Point:
    """One evaluated setting; `snapshot` None is the base, w = 0."""

    snapshot: str | None
    w: float
    result: dict[str, Any]

    @property
    def fid(self) -> float:
        return self.result["fid"]


def find_snapshots(folder: str | Path, least_kimg: float = 0, most_kimg: float = float("inf")) -> dict[int, Path]:
    """Images seen -> file, in order, of our snapshots (`snapshot-<images>.safetensors`) or the official ones
    (`network-snapshot-<kimg>.pkl`). Raises UserError where there is none in the range."""
    found = {}
    for path in Path(folder).glob("*snapshot-*"):
        ours = re.fullmatch(r"snapshot-(\d+)\.safetensors", path.name)
        theirs = re.fullmatch(r"network-snapshot-(\d+)\.pkl", path.name)
        images = int(ours[1]) if ours else 1000 * int(theirs[1]) if theirs else None
        if images is not None and least_kimg * 1000 <= images <= most_kimg * 1000:
            found[images] = path
    if not found:
        raise UserError(f"{folder}: no snapshots between {least_kimg} and {most_kimg} thousand images in it")
    return dict(sorted(found.items()))


def search_grid(
    backbone: Backbone,
    snapshots: Sequence[Path],
    weights: Sequence[float],
    evaluate: Evaluate,
    out_dir: str | Path,
    *,
    identity: Mapping[str, Any],
    stop_rise: float | None = None,
) -> list[Point]:
    """Every point of the grid, in order; `backbone` is at w = 0 again afterwards. Every rank calls it.

    `identity` (base, sampler, seeds, reference) must not change between runs into one `out_dir`. With `stop_rise`, the
    rest of a snapshot's weights is left out once FID exceeds that of the weight before by more. Raises UserError.
    """
    for w in weights:
        check_w(w)
    out_dir = Path(out_dir)
    theta_base = {name: value.detach().clone() for name, value in backbone.net.state_dict().items()}
    points: list[Point] = []
    at_base = _kept(out_dir / "base.json", identity, evaluate) if 0 in weights else None
    for path in snapshots:
        moving: NeonWeights | None = None
        here = {**identity, "snapshot": path.name, "snapshot_sha256": broadcast_object(is_main() and sha256_file(path))}
        before = None
        for w in weights:
            if w == 0:
                point = Point(None, 0.0, at_base)
            else:
                file = out_dir / path.stem / f"w={w:g}.json"
                result = _read(file, here | {"w": w})
                if result is None:
                    moving = moving or _weights(backbone, theta_base, path)
                    moving.set(w)
                    result = _kept(file, here | {"w": w}, evaluate)
                point = Point(path.name, w, result)
            if point.snapshot is not None or point not in points:
                points.append(point)
            print0(f"{path.stem} | w={w:g} | FID={point.fid:.6f}")
            if stop_rise is not None and before is not None and point.fid > before + stop_rise:
                break
            before = point.fid
        if moving is not None:
            moving.set(0)
    return points


def _weights(backbone: Backbone, theta_base: dict[str, Tensor], path: Path) -> NeonWeights:
    device = next(backbone.net.parameters()).device
    return NeonWeights(backbone.net, theta_base, read_checkpoint(path).state, device)


def _read(file: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The finished point in `file`, None if there is none; UserError where it was made otherwise."""

    def look() -> dict[str, Any] | str | None:
        if not file.exists():
            return None
        kept = json.loads(file.read_text())
        return kept["result"] if kept["key"] == _key(identity) else "other"

    found = broadcast_object(look() if is_main() else None)
    if found == "other":
        raise UserError(
            f"{file}: made with another base, snapshot, sampler, seeds or reference; name another --out_dir"
        )
    return found


def _kept(file: Path, identity: Mapping[str, Any], evaluate: Evaluate) -> dict[str, Any]:
    """The finished point in `file`, or a new one, written there."""
    result = _read(file, identity)
    if result is None:
        result = evaluate()
        if is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as temporary:
                kept = {"key": _key(identity), "made_with": dict(identity), "result": result}
                temporary.write_text(json.dumps(kept, indent=1, sort_keys=True, default=str) + "\n")
        barrier()
    return result


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
