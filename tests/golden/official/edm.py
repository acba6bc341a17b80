"""EDM: which rank makes which seeds, in which batches. Ours are dealt otherwise, with equal images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def generate_batches(seeds: Sequence[int], batch_size: int, world_size: int) -> list[list[list[int]]]:
    """The official generate.py: [rank][batch] -> seeds. Equal parts, so many that each rank has the same number of
    them; some may be empty."""
    num_batches = ((len(seeds) - 1) // (batch_size * world_size) + 1) * world_size
    batches = [part.tolist() for part in np.array_split(np.asarray(seeds, dtype=np.int64), num_batches)]
    return [batches[rank::world_size] for rank in range(world_size)]


def evaluate_batches(seeds: Sequence[int], batch_size: int, world_size: int) -> list[list[list[int]]]:
    """The official calculate_fid.py and sweeps: [rank][batch] -> seeds. Every world_size-th seed, in full batches."""
    mine = [list(seeds[rank::world_size]) for rank in range(world_size)]
    return [[part[i : i + batch_size] for i in range(0, len(part), batch_size)] for part in mine]
