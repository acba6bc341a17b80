"""`--log`: numbers and pictures of a run for TensorBoard or Weights & Biases; by default for neither.

log.jsonl and the results are written in any case. Whatever there is to say is said once, to `track`; it goes to the
tracker that `tracking` has opened, if any. One process of a run tracks: rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neon_files.errors import UserError

KINDS = ("none", "tensorboard", "wandb")


class Tracker(Protocol):
    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, pixels: np.ndarray) -> None:
        """uint8 [H, W, C]."""

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: Path):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.wandb: Any = wandb
        self.run = wandb.init(project="neon", name=folder.stem, dir=str(folder))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})  # wandb's own steps may not go back, ours do after a kill

    def picture(self, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(pixels)})

    def close(self) -> None:
        self.run.finish()


_current: list[Tracker] = []


@contextmanager
def tracking(kind: str, folder: Path, here: bool = True) -> Iterator[None]:
    """Inside, `track` and `track_picture` write to a tracker of `kind` in `folder`, where `here`. UserError where its
    package is not installed."""
    if kind == "none" or not here:
        yield
        return
    try:
        tracker: Tracker = _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder)
    except ImportError as error:
        raise UserError(f"--log {kind}: its package is not installed; run `pip install {kind}`") from error
    _current.append(tracker)
    try:
        yield
    finally:
        _current.remove(tracker)
        tracker.close()


def track(values: Mapping[str, Any], step: int) -> None:
    """Numbers at a step (images seen, images of a point); what is no number is left out."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    for tracker in _current:
        tracker.numbers(numbers, step)


def is_tracked() -> bool:
    return bool(_current)


def track_picture(name: str, images: np.ndarray) -> None:
    """uint8 [B, C, H, W] as one picture, in rows of about as many as there are rows."""
    columns = max(1, round(len(images) ** 0.5))
    rows = [np.concatenate(list(images[i : i + columns]), axis=2) for i in range(0, len(images), columns)]
    grid = np.concatenate([row for row in rows if row.shape == rows[0].shape], axis=1)
    for tracker in _current:
        tracker.picture(name, grid.transpose(1, 2, 0))
