"""The kind of a file that is not the expected one, by its first bytes."""

from __future__ import annotations

_KINDS = (  # first bytes -> kind
    (b"\x93NUMPY", "is a single array (.npy)"),
    (b"\x89HDF", "is an HDF5 file"),
    (b"\x89PNG", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
    (b"MATLAB", "is a MATLAB file"),
    (b"\x1f\x8b", "is compressed with gzip"),
    (b"BZh", "is compressed with bzip2"),
    (b"\xfd7zXZ", "is compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
    (b"\x80", "is a pickle, which is never run here"),
)


def stand_in(start: bytes) -> str:
    """The placeholder (web page, LFS pointer) that begins with `start`; "" where it may be the real file."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return "is a web page, probably an error message saved by a download"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    return ""


def other_kind(start: bytes) -> str:
    """The kind of the file that begins with `start`, if it is well known and no zip archive; else ""."""
    if not start:
        return "is empty"
    if start[8:10] == b'{"':
        return "is a safetensors file"
    return stand_in(start) or next((kind for magic, kind in _KINDS if start.startswith(magic)), "")
