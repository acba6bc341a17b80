"""Fashion-MNIST's files: read as they are published, and refused where they are something else."""

import gzip
import struct

import numpy as np
import pytest
import torch

from neon_files.errors import UserError
from neon_run.fashion import data


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_files(folder, train=6, heldout=4, suffix=".gz"):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", heldout)):
        parts = {
            f"{prefix}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), np.uint8),
            f"{prefix}-labels-idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, values in parts.items():
            packed = gzip.compress(idx(values)) if suffix else idx(values)
            (folder / f"{name}{suffix}").write_bytes(packed)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "NUM_TRAIN", 6)
    monkeypatch.setattr(data, "NUM_HELDOUT", 4)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_files_are_read_compressed_or_not(tmp_path, small, suffix):
    fashion = data.load_fashion(write_files(tmp_path, suffix=suffix))
    assert fashion.train_images.shape == (6, 1, 16, 16) and fashion.heldout_images.shape == (4, 1, 16, 16)
    assert fashion.train_images.dtype == torch.uint8 and fashion.train_labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pixel_is_the_mean_of_four_and_the_border_is_black():
    images = torch.full((1, 1, 28, 28), 200, dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([10, 21], dtype=torch.uint8)
    small = data.shrink(images)
    assert small[0, 0, 0].eq(0).all() and small[0, 0, :, 15].eq(0).all()
    assert small[0, 0, 1, 1] == round((10 + 21 + 200 + 200) / 4) and small[0, 0, 7, 7] == 200


def damaged(folder, change):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda packed: packed[:-40], "cut or damaged"),
        (lambda packed: b"not gzip at all", "cut or damaged"),
        (lambda packed: gzip.compress(gzip.decompress(packed)[:-1]), "more or fewer"),
        (lambda packed: gzip.compress(gzip.decompress(packed) + b"0"), "more or fewer"),
        (lambda packed: gzip.compress(idx(np.zeros((6, 32, 32), np.uint8))), "no idx file of 6 x 28 x 28"),
    ],
)
def test_damaged_files_are_refused(tmp_path, small, change, said):
    with pytest.raises(UserError, match=said) as refused:
        data.load_fashion(damaged(write_files(tmp_path), change))
    assert "train-images-idx3-ubyte.gz" in refused.value.message


def test_a_label_beyond_the_classes_is_refused(tmp_path, small):
    folder = write_files(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(4, 10, np.uint8))))
    with pytest.raises(UserError, match="a label is 10"):
        data.load_fashion(folder)


def test_a_missing_file_names_both_ways_to_get_it(tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist, or torchvision") as refused:
        data.load_fashion(tmp_path)
    assert "--data" in refused.value.message


def test_without_the_data_and_offline_one_sentence_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not on this machine; install Debian's package"):
        data.load_fashion()


def test_torchvisions_folder_is_found(tmp_path, monkeypatch, small):
    write_files(tmp_path / "datasets/FashionMNIST/raw", suffix="")
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path)
    assert len(data.load_fashion().train_images) == 6
