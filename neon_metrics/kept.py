"""What an evaluation keeps of its work: partial sums on disk, until the caller has its result there.

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
        """Batches done by an earlier run, on every rank; rank 0's accumulator takes their statistics over.

        A damaged file is set aside, and what it counted is made again; so are batches that two files count (as two
        runs at once leave them), in the smaller one.
        """
        done: list[int] = []
        if is_main():
            paths = sorted(self.folder.glob("rank-*.pt"))
            found = [saved for path in paths if (saved := intact(path, read_tensors, _batches_and_statistics))]
            for batches, statistics in sorted(found, key=lambda saved: -len(saved[0])):
                if not set(batches) & set(done):
                    part = new_accumulator()
                    part.load_state_dict(statistics)
                    accumulator.merge(part)
                    done += batches
            if done:
                self.save(accumulator, done)
                for path in paths:
                    if path != self._path(0):
                        path.unlink(missing_ok=True)
        done = broadcast_object(done)
        barrier()
        return done

    def save(self, accumulator: MetricAccumulator, batches: list[int]) -> None:
        """This rank's part, in place of what it saved before."""
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
            with suppress(OSError):  # not there, or another evaluation's work is in it
                folder.rmdir()


def _batches_and_statistics(saved: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    return list(saved["batches"]), saved["statistics"]
