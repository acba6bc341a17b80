"""One picture file -> uint8 [C, H, W]: grey or RGB, scaled by the full range of its kind, or refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image

from neon_files.kinds import other_kind

# Pillow's readers of plain pixels. Its others are stubs, documents and videos, or (PostScript) run a program.
FORMATS = ("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "PPM", "TGA", "PCX", "SGI",
           "QOI", "DDS")  # fmt: skip
MAX_PIXELS = 1 << 24  # 4096 x 4096; several are decoded at once
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
GREY = ("L", "I", "I;16", "I;16L", "I;16B", "I;16N")


def suffixes() -> set[str]:
    """Endings of the files that are read as pictures: ".png", ".jpg", ..."""
    PIL.Image.init()
    return {suffix for suffix, kind in PIL.Image.EXTENSION.items() if kind in FORMATS}


def other_suffixes() -> set[str]:
    """Endings of Pillow's other formats, which are not read as pictures: .pdf, .eps, .h5, .fits, ..."""
    return PIL.Image.EXTENSION.keys() - suffixes()


def open_picture(data: bytes) -> PIL.Image.Image:
    """Reads the header, no pixel yet. Raises ValueError, and Pillow's errors, where the picture cannot be used."""
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]  # AVIF needs a new Pillow
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=formats)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"it {_kind(data)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are read")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("it has several frames; save one picture per file")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"32 bits a pixel (mode {image.mode}), whose range is undefined; save it in 8 or 16")
    return image


def channels(image: PIL.Image.Image) -> int:
    """1 for grey, 3 for all else, which becomes RGB."""
    return 1 if image.mode in GREY else 3


def pixels(image: PIL.Image.Image) -> np.ndarray:
    """uint8 [C, H, W]. 16-bit grey v becomes round(255 v / 65535). ValueError where pixels are transparent."""
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    if has_alpha and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise ValueError("some pixels are transparent; put the picture on a background first")
    if image.mode in GREY and image.mode != "L":
        top = (1 << _bits(image)) - 1
        grey = (np.asarray(image).astype(np.int64).clip(0, top) * 510 + top) // (2 * top)
        return grey.astype(np.uint8)[None]
    array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _bits(image: Any) -> int:
    """Of grey pixels held in 16: a TIFF may use 12. ValueError where 0 is white, which Pillow does not invert."""
    if image.format != "TIFF":
        return 16
    if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise ValueError("a TIFF of more than 8 bits whose 0 is white; save it with 0 as black")
    return image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]


def _kind(data: bytes) -> str:
    """The kind of a file that Pillow cannot open."""
    kind = other_kind(data[:512]) or "is of no format that is read"
    return "is a damaged image" if kind == "is an image" else kind
