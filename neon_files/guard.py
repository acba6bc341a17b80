"""One guard around every reader of foreign bytes: any failure becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neon_files.errors import UserError

AGAIN = "download it again"
_LONGEST = 600  # characters that a damaged file may put into a message


class Unfit(UserError):
    """A defect of a file; `reading` puts the file's name before it."""


class Refused(UserError):
    """The file requires something outside the allow-list. Its message continues "the pickle ..."."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns any error within, but the interpreter's exits, into a UserError that names `path`."""
    try:
        yield
    except Refused as error:
        reason = (
            f"refused, nothing in it was run: the pickle {error.message[:_LONGEST]}; save a plain state dict instead"
        )
        raise UserError(f"{path}: {reason}") from error
    except Unfit as error:
        raise UserError(f"{path}: {error.message[:_LONGEST]}") from error
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: refused: its values are nested too deeply") from error
    except MemoryError as error:
        raise UserError(f"{path}: asks for more memory than there is; it is damaged, or too large here") from error
    except Exception as error:  # damage raises other errors in every library: zlib, struct, JSON, torch
        first = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path}: cut short or damaged ({first}); {AGAIN}") from error
