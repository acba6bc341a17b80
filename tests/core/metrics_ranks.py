"""What each rank of test_metrics_ranks.py does: its share of the images in, the reduced statistics out."""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from neon_core import distributed  # noqa: E402
from neon_core.distributed import on_rank_0, rank, session, world_size  # noqa: E402
from neon_files.atomic import write_json  # noqa: E402
from neon_metrics import (  # noqa: E402
    FunctionDetector,
    MetricAccumulator,
    MetricSettings,
    Reference,
    neighbours,
)
from neon_metrics.statistics import FeatureStatistics  # noqa: E402
from neon_run.check import machine  # noqa: E402

NUM_IMAGES = 53
METRICS = ("fid", "is", "kid", "prdc")
PIECES = 240  # elements of a piece of distances: several for each rank
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


def references() -> tuple[Reference, torch.Tensor]:
    """What the images are compared with: statistics, and the features of 60 real images."""
    real = torch.randn(60, 9, generator=torch.Generator().manual_seed(2)) + 3000
    return Reference.from_statistics(FeatureStatistics(9).update(real)), real


def wait_for_rank_0(folder: Path) -> None:
    """Rank 0 works until another rank has looked for its result; it has all cores."""
    seen, pause, threads = folder / "looked", time.sleep, torch.get_num_threads()

    def work() -> int:
        limit = time.monotonic() + 60
        while not seen.exists():
            assert time.monotonic() < limit, "nobody looks"
            pause(0.01)
        return torch.get_num_threads()

    distributed.time.sleep = lambda seconds: (seen.touch(), pause(seconds))
    assert on_rank_0(work) == distributed.cores() and torch.get_num_threads() == threads
    distributed.time.sleep = pause


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
        neighbours.CHUNK_ELEMENTS = PIECES
        write_json(folder / f"values-{rank()}.json", total.compute(*references()))
        wait_for_rank_0(folder)
        reduce_twice_seen(folder)
        write_json(folder / f"sum-{rank()}.json", machine.collective(torch.device("cpu")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
