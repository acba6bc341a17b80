"""Statistics of images that lie in a folder or .zip, shared out over ranks."""

from __future__ import annotations

import numpy as np
import torch

from neon_core.distributed import gather_objects, is_main, rank, world_size
from neon_core.seeds import deal, global_batches
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.detector import Detector
from neon_metrics.reference import Reference


def check_images(images: ImageSet) -> None:
    """UserError, on every rank alike, where the set holds arrays that are no pictures, or one that cannot be used."""
    if images.dtype != np.uint8:
        raise UserError(f"{images.path}: holds arrays of {images.dtype}; images are required")
    problem = None
    try:
        images.check(range(rank(), len(images), world_size()))
    except UserError as error:
        problem = error.message
    problems = [text for text in gather_objects(problem) if text is not None]
    if problems:
        raise UserError(problems[0])


def take_in(
    accumulator: MetricAccumulator, images: ImageSet, device: torch.device, batch_size: int, progress: bool = False
) -> MetricAccumulator:
    """The empty `accumulator` with every image of the set, over all ranks, which all call it."""
    batches = global_batches(len(images), batch_size)
    mine = deal(len(batches), rank(), world_size())
    for b in progress_bar(mine, desc="images", unit="batch", disable=not (progress and is_main())):
        items = np.arange(batches[b].start, batches[b].stop)
        accumulator.update(images.images(items).to(device), torch.from_numpy(items))
    return accumulator.reduced()


def reference_of(images: ImageSet, detector: Detector, device: torch.device, batch_size: int = 64) -> Reference:
    """Mean and covariance of the images' features. Every rank calls it. Raises UserError for images that cannot be
    used, and for no more images than features: their covariance is singular, and a distance to it biased."""
    check_images(images)
    if len(images) <= detector.num_features:
        raise UserError(
            f"{images.path}: {len(images)} images are too few for a covariance of {detector.num_features} features "
            f"({detector.name}); name more images, or a detector with fewer features"
        )
    accumulator = MetricAccumulator(detector, len(images), ("fid",))
    total = take_in(accumulator, images, device, batch_size, progress=True)
    assert total.feature_statistics is not None
    return Reference.from_statistics(total.feature_statistics, str(images.path), detector.name)
