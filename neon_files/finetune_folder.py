"""The folder of a fine-tune: its settings, snapshots and log."""

from __future__ import annotations

import json
from pathlib import Path

from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.run_files import read_record


def snapshot_path(out_dir: Path, images_seen: int) -> Path:
    return out_dir / f"snapshot-{images_seen:09d}.safetensors"


def find_snapshots(out_dir: str | Path) -> dict[int, Path]:
    """Images seen -> file, of all snapshots in a run's folder, in order."""
    paths = sorted(Path(out_dir).glob("snapshot-*.safetensors"))
    numbers = {path.stem.removeprefix("snapshot-"): path for path in paths}
    return {int(number): path for number, path in numbers.items() if number.isdecimal()}


def claim(out_dir: Path, identity: dict) -> None:
    """Record the identity of the fine-tune in this folder. UserError where it holds another one."""
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


def earlier_lines(path: Path, images_seen: int, end: int) -> tuple[list[str], list[str]]:
    """The lines of a log before and behind the steps that will be done, up to the first line that is damaged."""
    before, behind = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            number = json.loads(line)["images"]
            if number <= images_seen:
                before.append(line)
            elif number > end:
                behind.append(line)
        except (ValueError, TypeError, KeyError):
            break
    return before, behind
