"""What each rank of test_metrics_ranks.py does: its share of the images in, the reduced statistics out."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from neon_core.distributed import rank, session, world_size  # noqa: E402
from neon_metrics import FunctionDetector, MetricAccumulator, MetricSettings  # noqa: E402

NUM_IMAGES = 53
METRICS = ("fid", "is", "kid", "prdc")
SETTINGS = MetricSettings(is_splits=4, kid_subsets=5, kid_subset_size=20, nearest_k=3)


def detector() -> FunctionDetector:
    """A fixed random layer on the pixels; the features have a large common offset."""
    weight = torch.randn(15, 3 * 4 * 4, generator=torch.Generator().manual_seed(0)).double()

    def function(images):
        h = torch.tanh(images.flatten(1).double() / 64 - 2) @ weight.T  # [B, 15]; float64: the same in any batch
        return (h[:, :9] + 3000).float(), h[:, 9:]

    return FunctionDetector("random layer", 9, function, num_classes=6)


def images() -> torch.Tensor:
    return torch.randint(0, 256, (NUM_IMAGES, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def accumulate(indices: list[int], batch: int = 4) -> MetricAccumulator:
    accumulator, data = MetricAccumulator(detector(), NUM_IMAGES, METRICS, SETTINGS), images()
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        accumulator.update(data[part], part)
    return accumulator


def reduce_twice_seen(folder: Path) -> None:
    """Image 0 on every rank: an error on every rank."""
    try:
        accumulate([0, *range(1 + rank(), NUM_IMAGES, world_size())]).reduced()
    except ValueError as error:
        (folder / f"error-{rank()}.txt").write_text(str(error), encoding="utf-8")


def main(folder: Path) -> None:
    with session("cpu"):
        last = rank() == world_size() - 1
        shares = {
            "even": list(range(rank(), NUM_IMAGES, world_size())),
            "idle": list(range(NUM_IMAGES)) if last else [],  # no rank need have images to take part
        }
        for name, mine in shares.items():
            part = accumulate(mine)
            total = part.reduced()
            assert part.num_seen == part.feature_statistics.count == len(mine)  # the rank's own part stays as it was
            torch.save(total.state_dict(), folder / f"{name}-{rank()}.pt")
        reduce_twice_seen(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
