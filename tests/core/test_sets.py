"""Synthetic sets and image sets: what is written is read back, and what is wrong is named."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from core.pico import PicoBackbone

from neon_core.finetune import open_set
from neon_core.prepared import training_data
from neon_core.synthetic import check_labels, generate_set, image_name, read_manifest
from neon_files.errors import UserError
from neon_files.image_set import ImageSet

CPU = torch.device("cpu")


def write_zip(folder, archive):
    """The files of a set as one archive, its images first."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.suffix != ".png", p))
    with zipfile.ZipFile(archive, "w") as target:
        for file in files:
            target.write(file, file.relative_to(folder))


def make(folder, seeds=range(10), batch_size=4, **settings):
    return generate_set(PicoBackbone.fresh(), list(seeds), folder, settings=settings, batch_size=batch_size)


def write_png(path, value, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def test_a_set_is_read_back_lossless_with_its_labels(tmp_path):
    manifest = make(tmp_path / "S")
    found = ImageSet(tmp_path / "S")
    backbone = PicoBackbone.fresh()
    labels = backbone.assign_labels(range(10))
    assert torch.equal(found.images(range(10)), backbone.sample(range(10), labels))
    assert torch.equal(found.class_indices, labels)
    assert read_manifest(tmp_path / "S") == manifest and manifest["seeds"] == "0-9"


def test_images_do_not_depend_on_the_batch_size(tmp_path):
    make(tmp_path / "a", batch_size=4)
    make(tmp_path / "b", batch_size=1)
    a, b = ImageSet(tmp_path / "a").images(range(10)).int(), ImageSet(tmp_path / "b").images(range(10)).int()
    assert (a - b).abs().max() <= 1  # matrix products of other sizes may round otherwise


def test_names_are_the_official_ones():
    assert image_name(5999, 7) == "005000/005999_label7.png"
    assert image_name(12, None, subfolders=False) == "000012.png"


def test_a_second_run_keeps_every_file(tmp_path):
    make(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    make(tmp_path)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    make(tmp_path)
    written = {p for p in tmp_path.rglob("*") if p.is_file()}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f".000003_label3.png.{socket.gethostname()}"
    half = [tmp_path / "000000" / f"{name}-{pid}-7.part" for pid in (dead.pid, os.getpid())]
    for path in half:
        path.write_bytes(b"")
    make(tmp_path)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == written | {half[1]}, "that of a living process stays"


def test_another_set_in_the_folder_is_refused_and_kept(tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match="num_images = 10, not 12"):
        make(tmp_path, seeds=range(12))
    with pytest.raises(UserError, match="settings"):
        make(tmp_path, contrast=2.0)
    assert len(list(tmp_path.rglob("*.png"))) == 10


def test_a_set_records_every_torch_that_made_images_of_it(tmp_path, monkeypatch, capsys):
    manifest = make(tmp_path)
    assert manifest["torch"] == [torch.__version__]
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert make(tmp_path) == manifest, "nothing was made"
    pngs(tmp_path)[0].unlink()
    assert make(tmp_path)["torch"] == [*manifest["torch"], "99.0"] == read_manifest(tmp_path)["torch"]
    assert "goes on with 99.0, whose images may differ" in capsys.readouterr().err


def test_a_set_of_an_earlier_release_keeps_its_manifest(tmp_path):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "torch"}),
        encoding="utf-8",
    )
    before = path.read_bytes()
    make(tmp_path)
    assert path.read_bytes() == before


def test_images_of_unknown_origin_are_not_mixed_in(tmp_path):
    write_png(tmp_path / "mine.png", 3)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.png"]


def test_a_seed_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="occurs twice"):
        make(tmp_path, seeds=[1, 2, 1])


def test_an_unfinished_set_is_not_read_as_a_whole_one(tmp_path):
    make(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        read_manifest(tmp_path)


def pngs(folder):
    return sorted(folder.rglob("*.png"))


def overwrite(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "flipped": overwrite,
    "empty": lambda path: path.write_bytes(b""),
    "of another size": lambda path: PIL.Image.new("RGB", (9, 9)).save(path),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_lost_or_damaged_is_made_again_and_nothing_else(tmp_path, kind):
    manifest = make(tmp_path, seeds=range(12))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in pngs(tmp_path)}
    DAMAGE[kind](pngs(tmp_path)[5])
    assert make(tmp_path, seeds=range(12)) == manifest  # with the digest of all images
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in pngs(tmp_path)}
    assert {p: data for p, (data, _) in after.items()} == {p: data for p, (data, _) in before.items()}
    assert [p for p in after if after[p][1] != before[p][1]] == pngs(tmp_path)[4:8], "one batch"


def test_a_set_with_missing_images_is_refused_wherever_it_is_opened(tmp_path):
    make(tmp_path / "S")
    write_zip(tmp_path / "S", tmp_path / "S.zip")
    for path in pngs(tmp_path / "S")[3:5]:
        path.unlink()
    with zipfile.ZipFile(tmp_path / "few.zip", "w") as few, zipfile.ZipFile(tmp_path / "S.zip") as whole:
        for name in whole.namelist()[2:]:
            few.writestr(name, whole.read(name))
    for path in (tmp_path / "S", tmp_path / "few.zip"):
        for opening in (ImageSet, open_set, read_manifest):
            with pytest.raises(UserError, match=r"holds 8 images, its manifest\.json says 10; run the same generate"):
                opening(path)
    write_png(tmp_path / "mine.png", 1)
    make(tmp_path / "S")
    write_png(tmp_path / "S" / "mine.png", 1)
    with pytest.raises(UserError, match=r"holds 11 images, .* remove those that are not of the set"):
        ImageSet(tmp_path / "S")


def test_a_set_that_is_being_mended_is_not_finished(tmp_path):
    make(tmp_path)
    overwrite(pngs(tmp_path)[0])

    class Killed(PicoBackbone):
        def sample(self, *args, **settings):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_set(Killed.fresh(), range(10), tmp_path, settings={}, batch_size=4)
    with pytest.raises(UserError, match="not finished"):
        ImageSet(tmp_path)


def test_images_are_on_the_disk_before_the_listing_vouches_for_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        "neon_core.synthetic.flush", lambda path: flushed.append((path, (tmp_path / "dataset.json").exists()))
    )
    make(tmp_path)
    wanted = {*pngs(tmp_path), tmp_path, *(path.parent for path in pngs(tmp_path))}
    assert {path for path, _ in flushed} == wanted and not any(listed for _, listed in flushed)


def test_a_zip_holds_the_same_set(tmp_path):
    make(tmp_path / "S")
    shutil.make_archive(str(tmp_path / "S"), "zip", tmp_path / "S")
    a, b = ImageSet(tmp_path / "S"), ImageSet(tmp_path / "S.zip")
    assert a.names == b.names and torch.equal(a.images(range(10)), b.images(range(10)))
    assert np.array_equal(a.label_rows, b.label_rows)


def test_class_folders_give_labels_in_string_order(tmp_path):
    for number, name in enumerate(["n2", "n10", "A"]):
        write_png(tmp_path / name / "x.png", number)
    found = ImageSet(tmp_path)
    assert found.images([0, 1, 2])[:, 0, 0, 0].tolist() == [2, 1, 0]  # A, n10, n2
    assert found.class_indices.tolist() == [0, 1, 2]


def test_large_sets_are_read_when_asked_for(tmp_path, monkeypatch):
    make(tmp_path)
    whole = ImageSet(tmp_path).images([3, 1])
    monkeypatch.setattr("neon_files.image_set.IN_MEMORY_BYTES", 0)
    assert torch.equal(ImageSet(tmp_path).images([3, 1]), whole)


def broken(kind, folder):
    write_png(folder / "a.png", 1)
    write_png(folder / "b.png", 2)
    if kind == "cut":
        (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    elif kind == "shape":
        write_png(folder / "b.png", 2, size=5)
    elif kind == "label":
        (folder / "dataset.json").write_text(json.dumps({"labels": [["a.png", 0]]}), encoding="utf-8")
    elif kind == "json":
        (folder / "dataset.json").write_text("{", encoding="utf-8")
    elif kind == "npy":
        for picture in folder.iterdir():
            picture.unlink()
        buffer = io.BytesIO()
        np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        (folder / "a.npy").write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "kind, text",
    [
        ("cut", r"b\.png cannot be read"),
        ("shape", r"b\.png has shape \(3, 5, 5\)"),
        ("label", r"no label for b\.png"),
        ("json", r"dataset\.json is not a JSON"),
        ("npy", r"a\.npy cannot be read"),
    ],
)
def test_a_broken_set_names_the_file(tmp_path, kind, text):
    broken(kind, tmp_path)
    with pytest.raises(UserError, match=text):
        found = ImageSet(tmp_path)
        found.images([0, 1])
        _ = found.class_indices


def test_missing_and_empty_sets(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ImageSet(tmp_path / "none")
    with pytest.raises(UserError, match="no images"):
        ImageSet(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        ImageSet(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a zip archive"):
        ImageSet(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match="no images"):
        ImageSet(tmp_path / "empty.zip")


def test_labels_out_of_range_are_named():
    with pytest.raises(UserError, match="label 10 is out of range; this network has classes 0 to 9"):
        check_labels(torch.tensor([0, 10]), 10)
    with pytest.raises(UserError, match="unconditional"):
        check_labels(torch.tensor([0]), 0)
    check_labels(torch.tensor([0, 9]), 10)


class Dear(PicoBackbone):
    prepared_key = "squares-v1"
    prepared = 0

    def prepare(self, images):
        self.prepared += len(images)
        return images.float().square()


def remake_folder(folder, seed):
    generate_set(PicoBackbone.fresh(seed=seed), range(10), folder, settings={}, batch_size=4)


def remake_zip(path, seed):
    remake_folder(path.with_name(f"zipped-{seed}"), seed)
    write_zip(path.with_name(f"zipped-{seed}"), path)


def remake_classes(folder, seed):
    for number in range(10):
        write_png(folder / f"class{number % 4}" / f"{number}.png", 20 * seed + number, size=8)


def remake_plain_zip(path, seed):
    remake_classes(path.with_name(f"plain-{seed}"), seed)
    with zipfile.ZipFile(path, "w") as archive:
        for file in pngs(path.with_name(f"plain-{seed}")):
            archive.write(file, file.relative_to(path.with_name(f"plain-{seed}")))


@pytest.mark.parametrize(
    "name, remake",
    [("S", remake_folder), ("S.zip", remake_zip), ("C", remake_classes), ("C.zip", remake_plain_zip)],
)
def test_a_set_made_anew_in_the_same_place_is_another_set(tmp_path, name, remake):
    """Same names, same settings, other images: what was prepared of the old ones is not used."""
    digests = []
    for seed in (1, 2):
        path = tmp_path / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        remake(path, seed)
        images, backbone = ImageSet(path), Dear.fresh()
        data = training_data(backbone, images, CPU)
        assert torch.equal(data.items(np.arange(10)), images.images(range(10)).float().square())
        assert backbone.prepared == 10
        training_data(backbone, ImageSet(path), CPU)
        assert backbone.prepared == 10, "prepared once"
        digests.append(images.digest)
    assert digests[0] != digests[1]


def test_a_copy_of_a_set_is_the_same_set(tmp_path):
    """So that a fine-tune goes on after a move to another disk."""
    make(tmp_path / "S")
    write_zip(tmp_path / "S", tmp_path / "S.zip")
    shutil.copytree(tmp_path / "S", tmp_path / "T", copy_function=shutil.copyfile)  # with new times
    shutil.copyfile(tmp_path / "S.zip", tmp_path / "T.zip")
    assert ImageSet(tmp_path / "S").digest == ImageSet(tmp_path / "T").digest == ImageSet(tmp_path / "T.zip").digest


def test_other_labels_make_another_set(tmp_path):
    make(tmp_path)
    before = ImageSet(tmp_path).digest
    listing = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    listing["labels"][0][1] ^= 1
    (tmp_path / "dataset.json").write_text(json.dumps(listing), encoding="utf-8")
    assert ImageSet(tmp_path).digest != before


def test_what_is_prepared_once_is_kept_and_completed(tmp_path, monkeypatch):
    monkeypatch.setattr("neon_core.prepared.PART_ITEMS", 4)
    make(tmp_path / "S")
    backbone = Dear.fresh()
    first = training_data(backbone, ImageSet(tmp_path / "S"), CPU)
    wanted = ImageSet(tmp_path / "S").images([9, 0, 5]).float().square()
    assert torch.equal(first.batch(np.array([9, 0, 5]))[0], wanted) and backbone.prepared == 10
    parts = sorted(tmp_path.glob("S.prepared/*/part-*.npy"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:-8])  # cut short
    again = training_data(backbone, ImageSet(tmp_path / "S"), CPU)
    assert torch.equal(again.batch(np.array([9, 0, 5]))[0], wanted) and backbone.prepared == 14
