"""Files that a download or a copy left in place of the real one, known by their first bytes."""

from __future__ import annotations


def stand_in(start: bytes) -> str:
    """What the file that begins with `start` is instead of the real one; "" where it may be the real one."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return "is a web page, probably an error message saved by a download"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    return ""
