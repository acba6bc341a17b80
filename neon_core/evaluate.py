"""Seeds -> images -> statistics -> one result. What every calculate_fid.py and every sweep calls.

Images stay in memory: each rank samples its batches, extracts features and keeps sums; the sums meet at the end. With
`work_dir`, what is done is kept there from time to time, so that a killed evaluation continues, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, is_main, print0, rank, world_size
from neon_core.errors import UserError
from neon_core.files.atomic import atomic_path
from neon_core.metrics.accumulator import MetricAccumulator
from neon_core.seeds import deal, format_seeds, global_batches
from neon_core.synthetic import image_name, write_images


def evaluate(
    backbone: Backbone,
    seeds: Sequence[int],
    new_accumulator: Callable[[], MetricAccumulator],
    *,
    settings: dict,
    batch_size: int,
    work_dir: str | Path | None = None,
    identity: dict | None = None,
    save_images: str | Path | None = None,
    save_seconds: float = 30.0,
    progress: bool = True,
) -> MetricAccumulator:
    """Sample every seed once (repeats count as often as they stand) and return the statistics, reduced over ranks.

    `settings` go to `backbone.sample`. `work_dir` holds what is done, saved every `save_seconds`, and is emptied at
    the end; `identity` (weights' hash and the like) tells whether what lies there is of this run. `save_images` also
    writes PNGs. Every rank calls it; every rank gets the reduced statistics.
    """
    labels = backbone.assign_labels(seeds, **settings)
    batches = global_batches(len(seeds), batch_size)
    accumulator = new_accumulator()
    store = _Store(work_dir, {"seeds": format_seeds(seeds), "batch_size": batch_size, "settings": settings,
                              **(identity or {})}) if work_dir else None  # fmt: skip
    done = store.resume(accumulator, new_accumulator) if store else []
    mine = deal(len(batches), rank(), world_size(), done)
    if done:
        print0(f"continuing: {len(done)} of {len(batches)} batches were done in {store.folder}")
    bar = tqdm(total=len(seeds), initial=sum(len(batches[b]) for b in done), unit="img", desc="evaluate",
               disable=not (progress and is_main()))  # fmt: skip
    finished, saved_at = list(done) if is_main() else [], time.monotonic()
    for number, b in enumerate(mine):
        part = list(batches[b])
        own = None if labels is None else labels[part]
        images = backbone.sample([seeds[i] for i in part], own, **settings)
        accumulator.update(images, torch.tensor(part))
        if save_images is not None:
            names = [image_name(i, None if labels is None else int(labels[i])) for i in part]
            write_images(Path(save_images), names, images)
        finished.append(b)
        left = len(seeds) - bar.n
        bar.update(min(left, len(part) * world_size()) if number < len(mine) - 1 else left)
        if store and time.monotonic() - saved_at >= save_seconds:
            store.save(accumulator, finished)
            saved_at = time.monotonic()
    bar.close()
    accumulator.reduce()
    if store:
        store.clear()
    return accumulator


class _Store:
    """What a killed evaluation leaves: one file per rank, with its statistics and the batches in them."""

    def __init__(self, folder: str | Path, identity: dict):
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(folder)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _path(self, number: int) -> Path:
        return self.folder / f"partial-{self.key}-{number:03d}.pt"

    def resume(self, accumulator: MetricAccumulator, new_accumulator: Callable[[], MetricAccumulator]) -> list[int]:
        """Batches done by an earlier run, on every rank; rank 0's accumulator takes their statistics over."""
        done: list[int] = []
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = sorted(self.folder.glob(f"partial-{self.key}-*.pt"))
            for path in paths:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if set(saved["batches"]) <= set(done):  # merged already, by a run that was killed before it unlinked
                    continue
                if set(saved["batches"]) & set(done):
                    raise UserError(f"{path}: counts batches that another file counts too; remove {self.folder}")
                part = new_accumulator()
                part.load_state_dict(saved["statistics"])
                accumulator.merge(part)
                done += saved["batches"]
            if done:
                self.save(accumulator, done)
                for path in paths:
                    if path != self._path(0):
                        path.unlink()
        done = broadcast_object(done)
        barrier()
        return done

    def save(self, accumulator: MetricAccumulator, batches: list[int]) -> None:
        with atomic_path(self._path(rank())) as temporary:
            torch.save({"batches": list(batches), "statistics": accumulator.state_dict()}, temporary)

    def clear(self) -> None:
        barrier()
        if is_main():
            for path in self.folder.glob(f"partial-{self.key}-*.pt"):
                path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        barrier()


def sample_grid(backbone: Backbone, seeds: Sequence[int], **settings) -> Tensor:
    """uint8 [N, C, H, W] on the CPU, for a picture: the images of `seeds`, with the labels of a run over them."""
    return backbone.sample(seeds, backbone.assign_labels(seeds, **settings), **settings).cpu()
