"""What a fine-tune leaves in its folder: its settings, a log, snapshots. (`state.pt` is that of the loop.)"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from neon_core.distributed import all_reduce_, is_main, world_size
from neon_files.atomic import atomic_path, write_json
from neon_files.errors import UserError
from neon_files.run_files import read_record


def snapshot_path(out_dir: Path, images_seen: int) -> Path:
    return out_dir / f"snapshot-{images_seen:09d}.safetensors"


def find_snapshots(out_dir: str | Path) -> dict[int, Path]:
    """Images seen -> file, of all snapshots in a run's folder, in order."""
    found = sorted(Path(out_dir).glob("snapshot-*.safetensors"))
    numbers = {path.stem.removeprefix("snapshot-"): path for path in found}
    return {int(number): path for number, path in numbers.items() if number.isdecimal()}


def claim(out_dir: Path, identity: dict) -> None:
    """Record whose fine-tune this folder holds. UserError where it holds another one."""
    path = out_dir / "settings.json"
    if path.exists():
        earlier = read_record(path)
        if earlier != identity:
            a, b = ({**x, **x["settings"]} if isinstance(x.get("settings"), dict) else x for x in (earlier, identity))
            key = next(k for k in sorted({*a, *b}) if k != "settings" and a.get(k) != b.get(k))
            raise UserError(
                f"{out_dir}: holds a fine-tune with {key} = {a.get(key)!r}, not {b.get(key)!r}; name another --outdir"
            )
    elif find_snapshots(out_dir):
        raise UserError(f"{out_dir}: holds snapshots but no settings.json; name an empty or new --outdir")
    else:
        write_json(path, identity)


class StepLog:
    """`log.jsonl`, a line per step. Losses stay on the device until `settle`, so that no step waits for them."""

    def __init__(self, path: Path, images_seen: int, must_be_finite: bool):
        self.path, self.must_be_finite = path, must_be_finite
        self.lines = _earlier_lines(path, images_seen) if is_main() else []
        self.open: list[tuple[int, float, Tensor, Tensor]] = []  # images seen, lr, loss, gradient norm

    def add(self, images: int, lr: float, loss: Tensor, norm: Tensor | None) -> None:
        """A step: images seen after it, its learning rate, and what `settle` reads from the device."""
        self.open.append((images, lr, loss, loss.new_zeros([]) if norm is None else norm))

    def settle(self) -> float:
        """Write the lines of all steps so far, on rank 0; the last loss. A collective. Raises UserError where a loss
        or a gradient is not finite and must be."""
        losses = all_reduce_(torch.stack([loss for _, _, loss, _ in self.open])).tolist()
        norms = torch.stack([norm for *_, norm in self.open]).tolist()
        for (images, lr, *_), loss, norm in zip(self.open, losses, norms, strict=True):
            loss /= world_size()
            if self.must_be_finite and not (math.isfinite(loss) and math.isfinite(norm)):
                part = "gradient" if math.isfinite(loss) else "loss"
                raise UserError(
                    f"the {part} is not finite in the step up to {images} images; lower the learning rate, or use "
                    "--precision fp32"
                )
            self.lines.append(json.dumps({"images": images, "loss": loss, "lr": lr}))
        self.open = []
        if is_main():
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")
        return loss


def _earlier_lines(path: Path, images_seen: int) -> list[str]:
    """The lines of a log before the steps that will be done again, up to the first that is damaged."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["images"] > images_seen:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
    return kept
