"""Partial sums of an evaluation, kept on disk until the caller has saved its result.

<work_dir>/partial-<key>/rank-003.pt      statistics of one rank, and the batches in them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from neon_core.distributed import barrier, broadcast_object, is_main, rank
from neon_files.atomic import atomic_path
from neon_files.run_files import intact, read_tensors
from neon_metrics.accumulator import MetricAccumulator


class KeptWork:
    """The partial sums of one evaluation. `identity` (JSON) is everything that its images depend on, so that two
    evaluations may share a `work_dir`. Every rank calls `resume` and `save`; `clear` may be called by all or by one."""

    def __init__(self, work_dir: str | Path, identity: Mapping[str, Any]):
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(work_dir) / f"partial-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _path(self, number: int) -> Path:
        return self.folder / f"rank-{number:03d}.pt"

    def resume(self, accumulator: MetricAccumulator, new_accumulator: Callable[[], MetricAccumulator]) -> list[int]:
        """Batches finished by an earlier run, on every rank; rank 0's accumulator takes over their statistics.

        A damaged file is set aside, and its batches are computed again; so are batches that two files hold (as two
        runs at once leave them), in the smaller one.
        """
        finished: list[int] = []
        if is_main():
            paths = sorted(self.folder.glob("rank-*.pt"))
            parts = [saved for path in paths if (saved := intact(path, read_tensors, _batches_and_statistics))]
            for batches, statistics in sorted(parts, key=lambda saved: -len(saved[0])):
                if not set(batches) & set(finished):
                    part = new_accumulator()
                    part.load_state_dict(statistics)
                    accumulator.merge(part)
                    finished += batches
            if finished:
                self.save(accumulator, finished)
                for path in paths:
                    if path != self._path(0):
                        path.unlink(missing_ok=True)
        finished = broadcast_object(finished)
        barrier()
        return finished

    def save(self, accumulator: MetricAccumulator, batches: list[int]) -> None:
        """Save this rank's part, in place of its earlier one."""
        state = {"batches": list(batches), "statistics": accumulator.state_dict()}
        for last in (False, True):
            try:
                with atomic_path(self._path(rank())) as temporary, open(temporary, "wb") as file:
                    torch.save(state, file)
                return
            except FileNotFoundError:  # the same evaluation, started twice, has just cleared the folder
                if last:
                    raise

    def clear(self) -> None:
        """Remove all of it: the result is on disk."""
        if not is_main():
            return
        with suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):  # missing, or another evaluation's work is in it
                folder.rmdir()


def _batches_and_statistics(saved: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    return list(saved["batches"]), saved["statistics"]
