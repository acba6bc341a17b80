"""Seeds: lists of them, one generator per image, and the fixed global batches that are dealt to ranks.

An image draws all its randomness from the generator of its own seed, and a batch is a fixed slice of the seed list,
whatever the number of ranks. So 1, 2 or 8 ranks make the same images, bit for bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neon_files.errors import UserError

END = 1 << 32  # of the seeds: random streams repeat from there
MOST = 1 << 24  # seeds in one list, which is held in memory
Draw = Callable[[Tensor, torch.Generator], object]  # fills the tensor


def parse_seeds(text: str) -> list[int]:
    """ "0-3,7,5-6" -> [0, 1, 2, 3, 7, 5, 6]. Order and repeats are kept, blanks ignored, a descending range is empty.

    Raises UserError if a part is neither a number nor a range, and as `check_seeds`.
    """
    seeds: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UserError(
                f"seeds: {part!r} is neither a number nor a range; write a list like 0-9999,20000,30000-39999"
            )
        first, last = (int(n) if len(n.lstrip("0")) <= 10 else END for n in (match[1], match[2] or match[1]))
        check_seeds(range(first, last + 1), len(seeds))
        seeds.extend(range(first, last + 1))
    return seeds


def check_seeds(seeds: Sequence[int], others: int = 0) -> None:
    """UserError where seeds are beyond those that differ, or with `others` too many to be held."""
    if not seeds:
        return
    highest = seeds[-1] if isinstance(seeds, range) else max(seeds)
    if highest >= END:
        raise UserError(f"seeds: {highest} is beyond {END - 1}; random streams repeat from there, use lower seeds")
    if len(seeds) + others > MOST:
        raise UserError(f"seeds: {len(seeds) + others} of them; name at most {MOST}, and the others in another run")


def format_seeds(seeds: Sequence[int]) -> str:
    """The shortest list that `parse_seeds` reads back: [0, 1, 2, 7] -> "0-2,7"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


class PerImageRandom:
    """One generator per image, seeded with `seed mod 2^32` on `device` (CPU and CUDA draw different numbers).

    Every method returns one draw per image, stacked: [B, *shape]. A batch of other neighbours draws the same.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def _stack(
        self, draw: Callable[[Tensor, torch.Generator], object], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty((len(self.generators), *shape), dtype=dtype, device=self.device)
        for row, generator in zip(out, self.generators, strict=True):
            draw(row, generator)
        return out

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=g, dtype=dtype, device=self.device) for g in self.generators])

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform on [0, 1), [B, *shape]."""
        return torch.stack([torch.rand(shape, generator=g, dtype=dtype, device=self.device) for g in self.generators])

    def exponential(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exp(1), [B, *shape]: argmax of p / Exp(1) is a draw from p."""
        return self._stack(lambda row, g: row.exponential_(generator=g), shape, dtype)

    def randint(self, high: int) -> Tensor:
        """int64 [B], uniform on 0 .. high-1."""
        return torch.stack([torch.randint(high, size=[], generator=g, device=self.device) for g in self.generators])


def global_batches(num_images: int, batch_size: int) -> list[range]:
    """The fixed cut of 0 .. num_images-1 into batches; the last may be smaller. A function of these two alone."""
    return [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]


def deal(num_batches: int, rank: int, world_size: int, finished: Sequence[int] = ()) -> list[int]:
    """The batches of this rank: every world_size-th of those that are not finished."""
    skipped = set(finished)
    return [b for b in range(num_batches) if b not in skipped][rank::world_size]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, e.g. (run seed, step, micro batch): independent streams that need no state."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
