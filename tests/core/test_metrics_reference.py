"""Reference statistics: every published form is read, every broken one refused in one sentence that names it."""

import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neon_files.errors import UserError
from neon_metrics import FeatureStatistics, Reference, load_reference, write_reference

D = 6


@pytest.fixture
def statistics():
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    found = FeatureStatistics(D).update(x)
    return found.mean.numpy(), found.covariance().numpy()


@pytest.mark.parametrize("mu_type", [np.float32, np.float64])
@pytest.mark.parametrize("sigma_type", [np.float16, np.float32, np.float64])
def test_any_float_type_is_read_as_float64(tmp_path, statistics, mu_type, sigma_type):
    mu, sigma = statistics[0].astype(mu_type), statistics[1].astype(sigma_type)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    reference = load_reference(tmp_path / "ref.npz", D)
    assert reference.mu.dtype == reference.sigma.dtype == np.float64
    assert np.array_equal(reference.mu, mu.astype(np.float64))
    assert np.array_equal(reference.sigma, sigma.astype(np.float64))
    np.testing.assert_allclose(reference.factor @ reference.factor.T, reference.sigma, atol=1e-12)
    assert reference.factor is reference.factor  # computed once


def test_adm_file_is_read_without_its_images(tmp_path, statistics):
    """`arr_0` of ADM's files holds 10 GB of images. Here its bytes are broken, so that reading it would fail."""
    path = tmp_path / "adm.npz"
    marker = np.arange(4096, dtype=np.uint8)
    np.savez(path, mu=statistics[0], sigma=statistics[1], mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=marker)
    data = bytearray(path.read_bytes())
    at = data.find(marker.tobytes()[:64])
    assert at > 0
    data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile):
        np.load(path)["arr_0"]
    assert np.array_equal(load_reference(path).sigma, statistics[1])


def test_write_and_read_back(tmp_path, statistics):
    write_reference(tmp_path / "mine.npz", Reference(*statistics))
    reference = load_reference(tmp_path / "mine.npz")
    assert np.array_equal(reference.mu, statistics[0]) and np.array_equal(reference.sigma, statistics[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npz"]


def broken(mu, sigma, **changes):
    return {"mu": mu, "sigma": sigma, **changes}


def skewed(sigma):
    sigma = sigma.copy()
    sigma[1, 2] += 0.01
    return sigma


def with_value(array, value):
    array = array.copy()
    array.flat[2] = value
    return array


BAD_ARRAYS = {
    "no sigma": (lambda m, s: {"mu": m, "arr_0": m}, r"no sigma in it \(it holds mu, arr_0\)"),
    "neither": (lambda m, s: {"features": s}, r"no mu and no sigma in it \(it holds features\)"),
    "integers": (lambda m, s: broken(m.astype(int), s), "mu holds int64, not floating-point numbers"),
    "complex": (lambda m, s: broken(m, s.astype(complex)), "sigma holds complex128"),
    "mu as a row": (lambda m, s: broken(m[None], s), r"mu has the shape \[1, 6\]"),
    "sigma not square": (lambda m, s: broken(m, s[:5]), r"mu has 6 features, but sigma has the shape \[5, 6\]"),
    "sizes differ": (lambda m, s: broken(m[:5], s), r"mu has 5 features, but sigma has the shape \[6, 6\]"),
    "empty": (lambda m, s: broken(m[:0], s[:0, :0]), r"mu has the shape \[0\]"),
    "another network": (lambda m, s: broken(m[:4], s[:4, :4]), "made from 4 features, the detector gives 6"),
    "nan": (lambda m, s: broken(with_value(m, np.nan), s), "mu has 1 values that are not finite"),
    "infinity": (lambda m, s: broken(m, with_value(s, np.inf)), "sigma has 1 values that are not finite"),
    "asymmetric": (lambda m, s: broken(m, skewed(s)), "sigma is not symmetric"),
    "negative variance": (lambda m, s: broken(m, s - 5 * np.eye(D)), "negative variance"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path, statistics, name):
    make, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **make(*statistics))
    with pytest.raises(UserError, match=message) as error:
        load_reference(tmp_path / "bad.npz", D)
    assert str(tmp_path / "bad.npz") in error.value.message and "\n" not in error.value.message


class Bomb:
    """Its pickle writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_that_are_no_archives_are_refused_and_never_run(tmp_path, statistics):
    good = tmp_path / "good.npz"
    np.savez(good, mu=statistics[0], sigma=statistics[1])
    trace = tmp_path / "executed"
    files = {
        "cut.npz": good.read_bytes()[:-60],
        "half.npz": good.read_bytes()[:200],
        "empty.npz": b"",
        "page.npz": b"<html>404 not found</html>",
        "pickle.npz": pickle.dumps(Bomb(trace)),
    }
    flipped = bytearray(good.read_bytes())
    flipped[flipped.find(statistics[1].tobytes()[:16])] ^= 255
    files["flipped.npz"] = bytes(flipped)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "objects.npz", mu=np.array([Bomb(trace)], dtype=object), sigma=statistics[1])
    for name in [*files, "objects.npz"]:
        with pytest.raises(UserError, match=rf"{name}: not a readable \.npz archive"):
            load_reference(tmp_path / name)
    assert not trace.exists()


def test_files_of_other_kinds_are_called_by_name(tmp_path, statistics):
    np.save(tmp_path / "single.npy", statistics[1])
    torch.save({"mu": 1}, tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(1000):
            archive.writestr(f"{i}.png", b"")
    save_file({"mu": torch.zeros(D)}, tmp_path / "stats.safetensors")
    kinds = {
        "single.npy": "it is a single array",
        "torch.pt": "it holds the parts of a PyTorch file",
        "images.zip": "it holds 0.png, 1.png, 2.png, 3.png, 4.png and 995 more",
        "stats.safetensors": "it is a safetensors file",
    }
    contents = {
        "page.npz": (b"\n<!DOCTYPE html>", "it is a web page"),
        "lfs.npz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        "refs.pkl": (pickle.dumps({"fid": {"mu": 1}}), "it is a pickle, which is never run here"),
        "stats.h5": (b"\x89HDF\r\n", "it is an HDF5 file"),
        "stats.npz.gz": (b"\x1f\x8b\x08", "it is compressed with gzip"),
        "one.png": (b"\x89PNG\r\n", "it is an image"),
        "empty.npz": (b"", "it is empty"),
    }
    for name, (data, kind) in contents.items():
        (tmp_path / name).write_bytes(data)
        kinds[name] = kind
    for name, kind in kinds.items():
        with pytest.raises(UserError, match=rf"{name}: .*{kind}.*; name an archive with mu and sigma"):
            load_reference(tmp_path / name)


def test_a_header_is_refused_before_its_numbers_are_read(tmp_path):
    """A bomb: 0.2 MB that unpack to 200 MB; and headers that promise what is not there."""
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, mu=np.zeros(5000), sigma=np.zeros((5000, 5000)))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"bomb\.npz: made from 5000 features; at most 4096"):
        load_reference(path)
    assert time.monotonic() - began < 1
    np.savez(path, mu=np.zeros(1000), sigma=np.zeros((1000, 1000)))
    for old, new in ((b"(1000, 1000)", b"(9000, 1000)"), (b"(1000,)", b"(9000,)"), (b"(1000, 1000)", b"(-100, -100)")):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name).replace(old, new) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "lies.npz", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        with pytest.raises(UserError, match=r"lies\.npz: not a readable \.npz archive .*needs -?\d+ bytes, "):
            load_reference(tmp_path / "lies.npz")


def test_an_array_that_is_there_twice_is_refused(tmp_path, statistics):
    np.savez(tmp_path / "twice.npz", mu=statistics[0], sigma=statistics[1])
    with zipfile.ZipFile(tmp_path / "twice.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("mu.npy", archive.read("mu.npy"))
    with pytest.raises(UserError, match=r"twice\.npz: mu is in it twice"):
        load_reference(tmp_path / "twice.npz")


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"adm_in256_stats\.npz: no such file .* `bash download_models\.sh"):
        load_reference(tmp_path / "adm_in256_stats.npz")
    with pytest.raises(UserError, match="is a folder, not a file of reference statistics"):
        load_reference(tmp_path)
