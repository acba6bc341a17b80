"""How far a long loop is: a bar on a terminal; in the log of a job, one line a minute and one at the end."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 60.0  # between two lines
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


class _Lines(tqdm):
    """A bar that is written as lines."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n > self.initial and msg != "":  # not before anything is done
            self.fp.write(f"{self if msg is None else msg}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        if not self.disable and self.leave and self.n > self.last_print_n:
            self.display()
        self.fp = io.StringIO()  # where tqdm may end its line
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """`tqdm(iterable, **options)` for where stderr goes."""
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    lines = {"mininterval": SECONDS, "miniters": 1, "bar_format": LINE}
    return _Lines(iterable, **{**options, **lines})
