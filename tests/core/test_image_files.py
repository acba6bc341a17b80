"""What lies beside the images, which folder names a class, and what each kind of picture is worth in 8 bits."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest

from neon_files.errors import UserError
from neon_files.image_set import ImageSet


def picture(value, mode="RGB", size=(4, 4), kind="png", **options):
    buffer = io.BytesIO()
    PIL.Image.new(mode, size, value).save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def rgb(*names):
    return {name: picture((number, 0, 0)) for number, name in enumerate(names)}


def levels(images):
    return images.images(range(len(images)))[:, 0, 0, 0].tolist()


def test_what_systems_leave_beside_images_is_no_image_and_no_class(tmp_path):
    clutter = dict.fromkeys(
        ("._a.png", "Thumbs.db", "desktop.ini", "__MACOSX/cat/._0.png", "cat/._0.png"), b"\x00\x05\x16\x07"
    )
    clutter |= {name: picture(9) for name in (".ipynb_checkpoints/0.png", "cat/.hidden.png", "@eaDir/0.png")}
    classes = rgb("cat/0.png", "cat/1.png", "dog/0.png")
    for found in (
        ImageSet(write(tmp_path / "classes", classes | clutter)),
        ImageSet(pack(tmp_path / "classes.zip", classes | clutter)),
    ):
        assert levels(found) == [0, 1, 2] and found.class_indices.tolist() == [0, 0, 1]
    flat = rgb("0.png", "1.png") | {"dataset.json": json.dumps({"labels": [["0.png", 1], ["1.png", 0]]}).encode()}
    for found in (
        ImageSet(write(tmp_path / "flat", flat | clutter)),
        ImageSet(pack(tmp_path / "flat.zip", flat | clutter)),
    ):
        assert levels(found) == [0, 1] and found.class_indices.tolist() == [1, 0]


def test_files_of_other_kinds_are_left_out_with_a_word(tmp_path, capsys):
    others = {
        "a.pdf": b"%PDF",
        "b.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
        "c.h5": b"\x89HDF",
        "d.mpg": b"\0\0\1\xb3",
        "e.txt": b"",
    }
    assert levels(ImageSet(write(tmp_path, rgb("0.png") | others))) == [0]
    assert "ignored, not in a readable image format:" in capsys.readouterr().err


def test_folders_that_are_links_are_followed_once(tmp_path):
    write(tmp_path / "far", rgb("0.png", "1.png"))
    write(tmp_path / "set", rgb("cat/0.png"))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "dog" / "again").symlink_to(tmp_path / "set")
    found = ImageSet(tmp_path / "set")
    assert found.names == ["cat/0.png", "dog/0.png", "dog/1.png"] and found.class_indices.tolist() == [0, 1, 1]


def test_the_class_is_the_folder_right_above_the_image(tmp_path):
    names = ("part1/cat/0.png", "part1/dog/1.png", "part2/cat/2.png")
    assert ImageSet(write(tmp_path, rgb(*names))).class_indices.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_train_is_used_beside_other_splits(tmp_path, capsys, kind):
    files = rgb("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")
    found = ImageSet(write(tmp_path / "set", files) if kind == "folder" else pack(tmp_path / "set.zip", files))
    assert levels(found) == [0, 1] and found.class_indices.tolist() == [0, 1]
    assert "train/ is used, val left out" in capsys.readouterr().err


def test_a_class_that_is_called_train_stays_a_class(tmp_path):
    found = ImageSet(write(tmp_path, rgb("boat/0.png", "train/1.png", "test/2.png")))
    assert found.class_indices.tolist() == [0, 1, 2]


def test_mixed_depths_name_no_class(tmp_path):
    found = ImageSet(write(tmp_path, rgb("0.png", "masks/0.png")))
    assert len(ImageSet(tmp_path, use_labels=False)) == 2  # no labels are asked for
    with pytest.raises(UserError, match=r"0\.png and masks/0\.png lie at different depths"):
        _ = found.has_labels


@pytest.mark.parametrize(
    "names",
    [
        ("000000/000007_label1.png", "001000/001003_label0.png"),
        ("00000/img00000999.png", "00001/img00001000.png"),
        ("000000/000001.png", "001000/001000.png"),
    ],
)
def test_folders_that_only_number_the_images_are_no_classes(tmp_path, names):
    assert not ImageSet(write(tmp_path, rgb(*names))).has_labels


def test_a_set_one_folder_deeper_is_found_by_its_listing(tmp_path):
    files = rgb("S/000000/0.png", "S/001000/1.png")
    files["S/dataset.json"] = json.dumps({"labels": [["000000/0.png", 3], ["001000/1.png", 1]]}).encode()
    for found in (ImageSet(write(tmp_path / "outer", files)), ImageSet(pack(tmp_path / "S.zip", files))):
        assert found.class_indices.tolist() == [3, 1] and levels(found) == [0, 1]
    write(tmp_path / "outer", rgb("T/0.png"))
    with pytest.raises(UserError, match=r"lies deeper, at S/dataset\.json"):
        _ = ImageSet(tmp_path / "outer").class_indices


def test_labels_cost_nothing_where_none_are_asked_for(tmp_path):
    found = ImageSet(write(tmp_path, rgb("0.png") | {"dataset.json": b"{"}))
    assert levels(found) == [0]
    with pytest.raises(UserError, match=r"dataset\.json is not a JSON text"):
        _ = found.class_indices


RAMP = np.linspace(0, 65535, 64).reshape(8, 8)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "big.tif"])
def test_sixteen_bits_are_scaled_by_their_full_range(tmp_path, suffix):
    if suffix == "pgm":
        header = b"P5 8 8 65535\n"
        (tmp_path / "x.pgm").write_bytes(header + RAMP.astype(">u2").tobytes())
    elif suffix == "big.tif":
        PIL.Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()).save(tmp_path / "x.tif")
    else:
        PIL.Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"x.{suffix}")
    wanted = np.round(RAMP.astype(np.uint16) / 257).astype(np.uint8)
    assert np.array_equal(ImageSet(tmp_path).images([0])[0, 0].numpy(), wanted)


def tiff(bits, photometric, rows):
    """An uncompressed grey TIFF of 2 rows, by hand: Pillow writes none of 12 bits and none whose 0 is white."""
    tags = [(256, 4, 2), (257, 4, len(rows) // (bits * 2 // 8)), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 4, 2), (279, 4, len(rows))]  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + rows


def test_twelve_bits_are_scaled_by_theirs_and_white_zeros_are_refused(tmp_path):
    twelve = tiff(12, 1, bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00]))  # 0x000, 0xFFF; 0x800, 0x000
    assert ImageSet(write(tmp_path, {"x.tif": twelve})).images([0]).flatten().tolist() == [0, 255, 128, 0]
    write(tmp_path, {"x.tif": tiff(16, 0, bytes(8))})
    with pytest.raises(UserError, match=r"x\.tif cannot be read .*whose 0 is white"):
        ImageSet(tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype):
    PIL.Image.fromarray((RAMP / 65535).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif cannot be read .*32 bits a pixel"):
        ImageSet(tmp_path)


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("b.png", "a.png")])
def test_grey_among_colour_becomes_rgb(tmp_path, names):
    grey, colour = names
    write(tmp_path, {grey: picture(7, "L"), colour: picture((1, 2, 3))})
    found = ImageSet(tmp_path)
    images = dict(zip(found.names, found.images([0, 1])[:, :, 0, 0].tolist(), strict=True))
    assert images == {grey: [7, 7, 7], colour: [1, 2, 3]}


def test_a_grey_set_keeps_one_channel(tmp_path):
    assert ImageSet(write(tmp_path, {"a.png": picture(7, "L"), "b.png": picture(8, "L")})).shape == (1, 4, 4)


def test_transparent_pixels_are_refused_and_opaque_ones_read(tmp_path):
    write(tmp_path, {"a.png": picture((1, 2, 3, 255), "RGBA")})
    assert ImageSet(tmp_path).images([0])[0, :, 0, 0].tolist() == [1, 2, 3]
    write(tmp_path, {"a.png": picture((1, 2, 3, 200), "RGBA")})
    with pytest.raises(UserError, match=r"a\.png cannot be read .*transparent"):
        ImageSet(tmp_path)


def claiming(width, height):
    """A small picture whose header says another size."""
    data = bytearray(picture(0, "1"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def animation():
    return picture((1, 1, 1), kind="gif", save_all=True, append_images=[PIL.Image.new("RGB", (4, 4), (5, 5, 5))])


NO_IMAGES = {
    "empty": (b"", "it is empty"),
    "page": (b"<html>404</html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "of no format that is read"),
    "cut": (picture((1, 2, 3), size=(64, 64))[:60], "truncated|cannot be read"),
    "animated": (animation(), "several frames"),
    "huge": (claiming(9000, 8000), "9000x8000 pixels, at most"),
    "bomb": (claiming(30000, 20000), "exceeds limit"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_a_file_that_is_no_image_is_named(tmp_path, kind):
    data, reason = NO_IMAGES[kind]
    suffix = "gif" if kind == "animated" else "png"
    with pytest.raises(UserError, match=rf"b\.{suffix} cannot be read as an image \(.*({reason})") as error:
        found = ImageSet(write(tmp_path, {"a.png": picture((1, 2, 3)), f"b.{suffix}": data}))
        found.images([0, 1])
    assert "\n" not in error.value.message


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read .*no regular file"):
        ImageSet(tmp_path)


def array(value, **options):
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


SMALL = np.zeros((1, 2, 2), np.float32)


@pytest.mark.parametrize(
    "files, reason",
    [
        (
            {"a.png": picture((1, 2, 3)), "b.npy": array(SMALL)},
            r"images \(a\.png\) and arrays",
        ),
        (
            {"a.npy": array(SMALL), "b.npy": array(SMALL.astype(float))},
            r"b\.npy holds float64",
        ),
        ({"a.npy": array(np.array([{}], dtype=object), allow_pickle=True)}, r"a\.npy .*not of plain numbers"),
        ({"a.npy": array(np.zeros((4, 2, 2), np.float32))[:-8]}, r"a\.npy .*cut short"),
        ({"a.npy": array(np.zeros(4, np.float32)).replace(b"(4,)", b"(1<<60,)")}, r"a\.npy cannot be read"),
        (
            {"a.npy": array(SMALL).replace(b"(1, 2, 2)", b"(9999999999, 9999, 2)")},
            r"a\.npy cannot be read",
        ),
    ],
)
def test_arrays_are_one_kind_and_as_long_as_they_say(tmp_path, files, reason):
    with pytest.raises(UserError, match=reason):
        ImageSet(write(tmp_path, files)).images([0, 1])


LISTINGS = {
    "a list": ([["a.png", 0]], 'no|not a JSON object with "labels"'),
    "no labels": ({"label": []}, 'not a JSON object with "labels"'),
    "a table": ({"labels": {"a.png": 0}}, '"labels" is no list'),
    "flat": ({"labels": ["a.png", 0]}, "not of the form"),
    "triples": ({"labels": [["a.png", 0, 1], ["b.png", 0, 1]]}, "not of the form"),
    "text": ({"labels": [["a.png", "0"], ["b.png", "1"]]}, r"label of a\.png is '0'; a class is a whole number"),
    "truth": ({"labels": [["a.png", True], ["b.png", False]]}, r"label of a\.png is True"),
    "negative": ({"labels": [["a.png", 0], ["b.png", -1]]}, r"label of b\.png is -1"),
    "fraction": ({"labels": [["a.png", 0], ["b.png", 1.0]]}, r"label of b\.png is 1\.0"),
    "huge": ({"labels": [["a.png", 0], ["b.png", 10**12]]}, r"label of b\.png is 1000000000000"),
    "mixed": ({"labels": [["a.png", [0, 1]], ["b.png", 1]]}, r"label of b\.png is no vector of 2"),
    "ragged": ({"labels": [["a.png", [0, 1]], ["b.png", [1]]]}, r"label of b\.png is no vector of 2"),
    "not finite": ({"labels": [["a.png", [0.0, 1]], ["b.png", [float("nan"), 1]]]}, r"label of b\.png is no vector"),
    "two labels": ({"labels": [["a.png", 0], ["b.png", 1], ["a.png", 2]]}, r"a\.png has two labels, 0 and 2"),
    "absent": ({"labels": [["a.png", 0], ["b.png", 1], ["c.png", 2]]}, r"lists c\.png, not in the set"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_listing_of_another_form_is_named_with_its_entry(tmp_path, kind):
    content, reason = LISTINGS[kind]
    write(tmp_path, rgb("a.png", "b.png") | {"dataset.json": json.dumps(content).encode()})
    with pytest.raises(UserError, match=f"dataset\\.json.*({reason})"):
        _ = ImageSet(tmp_path).class_indices


def test_a_listing_is_bounded_in_depth_and_length(tmp_path):
    found = ImageSet(write(tmp_path, rgb("a.png") | {"dataset.json": b"[" * 500_000}))
    with pytest.raises(UserError, match=r"dataset\.json is nested too deeply"):
        _ = found.has_labels
    found = ImageSet(write(tmp_path, {"dataset.json": b"[" + b"[]," * 1_000_000}))
    with pytest.raises(UserError, match=r"dataset\.json cannot be read \(it has 3000001 bytes"):
        _ = found.has_labels


def test_zips_that_cannot_be_trusted_are_named_with_the_entry(tmp_path):
    path, files = tmp_path / "s.zip", {"a.png": picture((1, 2, 3))}
    whole = pack(path, files).read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[0].header_offset
    directory = whole.find(b"PK\1\2")
    encrypted = bytearray(whole)
    encrypted[start + 6] |= 1
    encrypted[directory + 8] |= 1
    damaged = bytearray(whole)
    damaged[start + 45] ^= 255
    bomb = bytearray(whole)
    struct.pack_into("<I", bomb, directory + 24, 300 << 20)  # what it says it unpacks to
    reasons = ((encrypted, "it is encrypted"), (damaged, "Bad CRC-32"), (bomb, "it unpacks to 314572800 bytes"))
    for data, reason in reasons:
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"s\.zip: a\.png cannot be read as an image \(.*{reason}"):
            ImageSet(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.png", files["a.png"])
        archive.writestr("a.png", picture((9, 9, 9)))
    with pytest.raises(UserError, match=r"s\.zip: a\.png is in it twice"):
        ImageSet(path)


def test_a_folder_called_zip_is_a_folder_and_a_file_is_none(tmp_path):
    assert len(ImageSet(write(tmp_path / "S.zip", rgb("0.png")))) == 1
    with pytest.raises(UserError, match="is a file; name a folder"):
        ImageSet(tmp_path / "S.zip" / "0.png")
