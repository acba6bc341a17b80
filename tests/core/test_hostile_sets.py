"""Mutated image sets, listings and references: one sentence or a result, never a traceback, a hang or a full memory."""

import io
import json
import random
import resource
import struct
import time
import warnings
import zipfile

import numpy as np
import PIL.Image
import pytest

from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_metrics.reference import load_reference

SECONDS, BYTES = 10, 1 << 30
EXTREMES = [struct.pack("<I", n) for n in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]
WORDS = [
    b"99999999999999999999",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[[[[[[",
    b"{",
    b'"',
    b"\\u0000",
    b"true",
    b"\xff\xfe",
]


def picture(kind, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def array(value):
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def archive(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return buffer.getvalue()


LISTING = json.dumps({"labels": [["a.png", 3], ["b.png", [0.5, 1.0]], ["c.png", None]]}).encode()
PICTURES = {
    "a.png": picture("png"), "a.jpg": picture("jpeg"), "a.gif": picture("gif", "P"), "a.tif": picture("tiff"),
    "b.tif": picture("tiff", "L"), "a.bmp": picture("bmp"), "a.webp": picture("webp"), "a.ppm": picture("ppm"),
    "a.tga": picture("tga"), "a.npy": array(np.zeros((3, 8, 8), np.float32)),
}  # fmt: skip
ZIPS = [archive({"a.png": picture("png"), "b.png": picture("png"), "dataset.json": LISTING}, method)
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]  # fmt: skip
NPZS = [archive({"mu.npy": array(np.ones(6)), "sigma.npy": array(np.eye(6))}, method)
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]  # fmt: skip


def mutated(rng, data):
    """A few random changes: bits, cuts, repeats, numbers and words put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(data) + 1), rng.randrange(1, 9)
        change = rng.choice(("bit", "cut", "remove", "repeat", "number", "word"))
        if change == "bit" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == "cut" and rng.random() < 0.3:
            del data[at:]
        elif change == "remove":
            del data[at : at + length]
        elif change == "repeat":
            data[at:at] = data[at : at + length] * rng.randrange(1, 50)
        elif change == "number":
            data[at : at + 4] = rng.choice(EXTREMES)
        elif change == "word":
            data[at:at] = rng.choice(WORDS)
    return bytes(data)


def open_set(path):
    images = ImageSet(path)
    _ = images.digest, images.label_rows
    images.images(range(len(images)))


def hostile(rng, folder, number):
    """A file of some kind, mutated, and what reads it."""
    kind = rng.choice(("zip", "picture", "listing", "npz"))
    place = folder / f"{number}"
    if kind == "zip":
        path = place.with_suffix(".zip")
        path.write_bytes(mutated(rng, rng.choice(ZIPS)))
        return path, open_set
    if kind == "npz":
        path = place.with_suffix(".npz")
        path.write_bytes(mutated(rng, rng.choice(NPZS)))
        return path, lambda path: load_reference(path).factor
    place.mkdir()
    if kind == "picture":
        name = rng.choice(sorted(PICTURES))
        (place / name).write_bytes(mutated(rng, PICTURES[name]))
        return place, open_set
    for name in ("a.png", "b.png", "c.png"):
        (place / name).write_bytes(PICTURES["a.png"])
    (place / "dataset.json").write_bytes(mutated(rng, LISTING))
    return place, open_set


def attack(folder, count, seed):
    """How many of `count` inputs were read, and how many refused."""
    rng, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's and numpy's, about odd files
        for number in range(count):
            path, read = hostile(rng, folder, number)
            began = time.monotonic()
            try:
                read(path)
                outcomes["read"] += 1
            except UserError as error:
                assert str(path) in error.message and "\n" not in error.message, error.message
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"input {number} of seed {seed} ({path})") from error
            assert time.monotonic() - began < SECONDS, f"input {number} of seed {seed}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < BYTES, f"{grown} bytes"
    return outcomes


def test_mutated_files_give_one_sentence_or_a_result(tmp_path):
    outcomes = attack(tmp_path, 240, seed=0)
    assert min(outcomes.values()) > 20, outcomes  # mutations must leave some whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_mutated_files_give_one_sentence_or_a_result(tmp_path, seed):
    """2,400 inputs: more than ten seconds where other tests run beside it."""
    attack(tmp_path, 600, seed)


LISTINGS = {
    "a deep listing": b'{"labels":' * 100_000,
    "a wide label": json.dumps({"labels": [["a.png", [0] * 10**6]]}).encode(),
    "a label beyond all classes": b'{"labels": [["a.png", 4294967295]]}',
    "a number of many digits": b'{"labels": [["a.png", ' + b"9" * 10**6 + b"]]}",
}
BOMBS = {kind: {"a.png": PICTURES["a.png"], "dataset.json": listing} for kind, listing in LISTINGS.items()} | {
    "zeros as a picture": {"a.png": bytes(100 << 20)},
    "zeros as an array": {"a.npy": PICTURES["a.npy"] + bytes(100 << 20)},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_small_files_that_unpack_to_much_are_refused_at_once(tmp_path, kind):
    path = tmp_path / "bomb.zip"
    path.write_bytes(archive(BOMBS[kind], zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=r"bomb\.zip"):
        open_set(path)
    assert time.monotonic() - began < SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES
