"""Running statistics of a set of images: mergeable, summable over ranks, and savable in the middle.

`FeatureStatistics` serves FID, `InceptionScoreStatistics` IS. Both keep a few float64 arrays whose
size does not depend on the number of images; neither keeps features or logits.
Shapes: B batch, D features, K classes, S splits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neon_core.distributed import all_reduce_
from neon_files.errors import UserError

SEED = 2020  # torch-fidelity's, for the shuffle of IS and the subsets of KID


class FeatureStatistics:
    """Count, mean [D] and scatter matrix sum (x - mean)(x - mean)^T [D, D], float64.

    Parts are joined by Chan, Golub and LeVeque's formula (1979): with d = mean2 - mean1 and n = n1 + n2,
    mean = mean1 + d n2 / n and M = M1 + M2 + d d^T n1 n2 / n. Unlike plain sums of x x^T it loses no digits where the
    mean is large against the spread, in whatever order the parts come.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Take in [B, D] of any float type; B = 0 changes nothing."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features must be [B, {self.num_features}]; got {tuple(features.shape)}")
        x = features.detach().to(self.mean.device, torch.float64)
        if len(x):
            mean = x.mean(dim=0)
            self._join(len(x), mean, x - mean)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Take in the images that `other` has seen."""
        if other.num_features != self.num_features:
            raise ValueError(f"cannot merge statistics of {other.num_features} and {self.num_features} features")
        if other.count:
            self.scatter += other.scatter.to(self.scatter.device)
            self._join(other.count, other.mean.to(self.mean.device))
        return self

    def _join(self, count: int, mean: Tensor, centred: Tensor | None = None) -> None:
        """Add `count` images of this mean; `centred` [B, D] are those whose scatter is not yet in."""
        delta, total = mean - self.mean, self.count + count
        rows = (delta * (self.count * count / total) ** 0.5)[None]  # as one more row: a single matrix product does both
        rows = rows if centred is None else torch.cat([centred, rows])
        self.scatter.addmm_(rows.T, rows)
        self.mean += delta * (count / total)
        self.count = total

    def all_reduced(self) -> FeatureStatistics:
        """The statistics over all ranks' images, on every rank; `self` stays as it is."""
        device = self.mean.device
        total = FeatureStatistics(self.num_features, device)
        total.count = int(all_reduce_(torch.tensor(self.count, device=device)))
        total.mean = all_reduce_(self.mean * (self.count / max(total.count, 1)))
        delta = (self.mean - total.mean) * self.count**0.5
        total.scatter = all_reduce_(self.scatter + torch.outer(delta, delta))
        return total

    def covariance(self) -> Tensor:
        """[D, D] with divisor n - 1, exactly symmetric. UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, and there are {self.count}")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`, on any device. ValueError where shapes differ."""
        _copy_in(self, state, "mean", "scatter")
        self.count = int(state["count"])


class InceptionScoreStatistics:
    """Per split: number of rows, sum of p [K] and sum of p log p, where p is the softmax of one image's logits.

    The number of images is known beforehand, and so is the split of each: torch-fidelity permutes the rows by
    `RandomState(seed).permutation(n)` and cuts them into `splits` parts, part i from floor(i n / s) to
    floor((i + 1) n / s). So no logits are kept, and the images may come in any order.

    `file_order` [n] lists the images in the order in which the official script would read their files, where that is
    not the order of their indices.
    """

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        *,
        splits: int = 10,
        shuffle: bool = True,
        seed: int = SEED,
        file_order: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ):
        if not 1 <= splits <= num_images:
            raise UserError(
                f"the Inception Score takes {splits} parts of the images, and there are {num_images} images"
            )
        rows = np.random.RandomState(seed).permutation(num_images) if shuffle else np.arange(num_images)
        images = rows if file_order is None else np.asarray(file_order)[rows]
        bounds = np.arange(splits + 1) * num_images // splits
        split_of_image = np.empty(num_images, dtype=np.int64)
        split_of_image[images] = np.repeat(np.arange(splits), np.diff(bounds))
        self.split_of_image = torch.from_numpy(split_of_image).to(device)
        self.expected = torch.from_numpy(np.diff(bounds)).to(device)
        self.rows = torch.zeros(splits, dtype=torch.int64, device=device)
        self.sum_p = torch.zeros(splits, num_classes, dtype=torch.float64, device=device)
        self.sum_p_log_p = torch.zeros(splits, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, indices: Tensor) -> InceptionScoreStatistics:
        """Take in logits [B, K] of the images number `indices` [B]; each image once."""
        device = self.sum_p.device
        log_p = logits.detach().to(device, torch.float64).log_softmax(dim=1)
        p = log_p.exp()
        split = self.split_of_image[indices.to(device)]
        self.rows.index_add_(0, split, torch.ones_like(split))
        self.sum_p.index_add_(0, split, p)
        # p = 0 counts 0, also where log p is -inf
        self.sum_p_log_p.index_add_(0, split, torch.where(p > 0, p * log_p, 0.0).sum(dim=1))
        return self

    def merge(self, other: InceptionScoreStatistics) -> InceptionScoreStatistics:
        """Take in the images that `other` has seen; both must be parts of the same set."""
        if not torch.equal(self.split_of_image.cpu(), other.split_of_image.cpu()):
            raise ValueError("cannot merge Inception Score statistics of differently split sets")
        for name in ("rows", "sum_p", "sum_p_log_p"):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)
        return self

    def all_reduced(self) -> InceptionScoreStatistics:
        """The statistics over all ranks' images, on every rank; `self` stays as it is."""
        total = object.__new__(InceptionScoreStatistics)
        total.split_of_image, total.expected = self.split_of_image, self.expected
        for name in ("rows", "sum_p", "sum_p_log_p"):
            setattr(total, name, all_reduce_(getattr(self, name).clone()))
        return total

    def score(self) -> tuple[float, float]:
        """(mean, population standard deviation) over the splits of exp(mean_x KL(p(y|x), p(y))), Salimans et al. 2016.

        The divergence is mean_x sum p log p - sum q log q with q = mean_x p. ValueError while images are missing.
        """
        if not torch.equal(self.rows, self.expected):
            raise ValueError(f"Inception Score of {int(self.expected.sum())} images after {int(self.rows.sum())} rows")
        q = self.sum_p / self.rows[:, None]
        divergence = self.sum_p_log_p / self.rows - torch.special.xlogy(q, q).sum(dim=1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(unbiased=False))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in ("rows", "sum_p", "sum_p_log_p")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()` of the same set. ValueError where shapes differ."""
        _copy_in(self, state, "rows", "sum_p", "sum_p_log_p")


def _copy_in(statistics: object, state: dict[str, Tensor], *names: str) -> None:
    for name in names:
        mine = getattr(statistics, name)
        if state[name].shape != mine.shape:
            raise ValueError(f"{name}: saved {tuple(state[name].shape)}, here {tuple(mine.shape)}")
        mine.copy_(state[name])
