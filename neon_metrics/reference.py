"""Reference statistics: mean and covariance of the features of real images, as the published .npz files hold them."""

from __future__ import annotations

import hashlib
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from neon_files.atomic import atomic_path
from neon_files.errors import UserError, one_line
from neon_files.foreign import npy_header, npy_numbers
from neon_files.home import download_command
from neon_files.kinds import other_kind
from neon_metrics.covariance import psd_factor
from neon_metrics.statistics import FeatureStatistics

COMMENT = "detector: "
MAX_FEATURES = 4096  # twice Inception's; a covariance of them takes 128 MiB


@dataclass(frozen=True)
class Reference:
    """mu [D] and sigma [D, D], float64. Keep one object per process: its factor is computed once."""

    mu: np.ndarray
    sigma: np.ndarray
    name: str = field(default="reference", compare=False)  # for messages
    detector: str = field(default="", compare=False)  # whose features; "": not recorded, as in the published files

    @classmethod
    def from_statistics(cls, statistics: FeatureStatistics, name: str = "reference", detector: str = "") -> Reference:
        """Of the images that `statistics` has seen."""
        return cls(statistics.mean.cpu().numpy().copy(), statistics.covariance().cpu().numpy(), name, detector)

    def check_detector(self, name: str, num_features: int) -> None:
        """UserError where these are statistics of another detector's features."""
        if self.detector and self.detector != name:
            raise UserError(f"{self.name}: made with the detector {self.detector}, not {name}; name that --detector")
        if len(self.mu) != num_features:
            raise UserError(f"{self.name}: made from {len(self.mu)} features, the detector gives {num_features}")

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the numbers, wherever they were read from."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()[:16]

    @cached_property
    def factor(self) -> np.ndarray:
        """L [D, r] with L L^T = sigma. UserError where sigma is not positive semi-definite."""
        try:
            return psd_factor(self.sigma)
        except UserError as error:
            raise UserError(f"{self.name}: {error.message}") from error


def load_reference(path: str | Path, num_features: int | None = None) -> Reference:
    """`mu` and `sigma` of an .npz file in any float type, as float64; other arrays in the file are not read.

    UserError naming the file and the problem: missing or unreadable file, missing key, wrong type or shape (D must be
    `num_features` where given), values that are not finite, a sigma that is not symmetric or has negative variances.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file of reference statistics; name an .npz in it")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file of reference statistics; the published ones come with `{download_command()}`"
        )
    mu, sigma = (array.astype(np.float64, copy=False) for array in _read(path, num_features))
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has {np.count_nonzero(~np.isfinite(array))} values that are not finite")
    asymmetry = np.max(np.abs(sigma - sigma.T))
    if asymmetry > 1e-5 * np.max(np.abs(sigma)):
        raise UserError(f"{path}: sigma is not symmetric (largest difference {asymmetry:.3g}), so it is no covariance")
    if np.min(np.diag(sigma)) < 0:
        raise UserError(f"{path}: sigma has a negative variance ({np.min(np.diag(sigma)):.3g}), so it is no covariance")
    return Reference(mu, (sigma + sigma.T) / 2, str(path), _detector(path))


def _detector(path: Path) -> str:
    """The name that `write_reference` leaves in the archive's comment."""
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment.decode("utf-8", "replace")
    return comment.removeprefix(COMMENT) if comment.startswith(COMMENT) else ""


def _read(path: Path, num_features: int | None) -> list[np.ndarray]:
    """mu and sigma in their own type. Every header is read, and refused, before any numbers are."""
    remedy = "name an archive with mu and sigma, as numpy.savez writes it"
    try:
        with open(path, "rb") as file:
            kind = other_kind(file.read(512))
        if kind:
            raise UserError(f"{path}: not a readable .npz archive: it {kind}; {remedy}")
        with zipfile.ZipFile(path) as archive, ExitStack() as opened:
            members = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            missing = [name for name in ("mu", "sigma") if name not in members]
            if missing:
                there = _contents(members)
                raise UserError(f"{path}: no {' and no '.join(missing)} in it (it holds {there}); {remedy}")
            twice = [name for name in ("mu", "sigma") if members.count(name) > 1]
            if twice:
                raise UserError(f"{path}: {twice[0]} is in it twice; {remedy}")
            infos = [archive.getinfo(f"{name}.npy") for name in ("mu", "sigma")]
            files = [opened.enter_context(archive.open(info)) for info in infos]
            headers = [npy_header(file, info.file_size) for file, info in zip(files, infos, strict=True)]
            _check_headers(path, headers[0], headers[1], num_features)
            return [npy_numbers(file, *header) for file, header in zip(files, headers, strict=True)]
    except UserError:
        raise
    except Exception as error:  # foreign bytes: zipfile and numpy raise many kinds
        raise UserError(f"{path}: not a readable .npz archive of plain arrays ({one_line(error)})") from error


def _check_headers(path: Path, mu: tuple, sigma: tuple, num_features: int | None) -> None:
    """UserError where the arrays of these (shape, order, dtype) are no mean and no covariance."""
    for name, (shape, _, dtype), ndim in (("mu", mu, 1), ("sigma", sigma, 2)):
        if dtype.kind != "f":
            raise UserError(f"{path}: {name} holds {dtype}, not floating-point numbers")
        if len(shape) != ndim or 0 in shape:
            raise UserError(f"{path}: {name} has the shape {list(shape)}, expected {['D', 'D, D'][ndim - 1]!r}")
    count = mu[0][0]
    if sigma[0] != (count, count):
        raise UserError(f"{path}: mu has {count} features, but sigma has the shape {list(sigma[0])}")
    if num_features is not None and count != num_features:
        raise UserError(f"{path}: made from {count} features, the detector gives {num_features}")
    if count > MAX_FEATURES:
        raise UserError(f"{path}: made from {count} features; at most {MAX_FEATURES} can be handled")


def _contents(members: list[str]) -> str:
    if any(name.endswith("/data.pkl") for name in members):
        return "the parts of a PyTorch file"
    shown = ", ".join(members[:5]) or "nothing"
    return shown + (f" and {len(members) - 5:,} more" if len(members) > 5 else "")


def write_reference(path: str | Path, reference: Reference) -> None:
    """An .npz with `mu` and `sigma`, float64, under its final name only when whole; the detector's name, where it is
    known, in the archive's comment, which other readers ignore."""
    with atomic_path(Path(path)) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, mu=reference.mu, sigma=reference.sigma)
        if reference.detector:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = (COMMENT + reference.detector).encode()
