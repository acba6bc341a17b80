"""One row with random weights: images a second, memory and launches, and the hours that its stages will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.distributed import gather_objects, world_size
from neon_core.precision import float32_precision
from neon_core.seeds import parse_seeds
from neon_core.selftrain import FineTune, MicroBatch
from neon_files.errors import UserError, one_line
from neon_metrics.detector import InceptionDetector
from neon_metrics.inception import InceptionV3
from neon_run.check.launches import Launches, TooSlow
from neon_run.check.machine import wait
from neon_run.check.parts import CheckParts
from neon_run.row import Row

LONG_ENOUGH = 0.3  # seconds of sampling on a CPU that a rate is taken from
DETECTOR_IMAGES = 4  # on a CPU


@dataclass(frozen=True)
class Effort:
    """How much is measured of a row, and what is too much."""

    batch_size: int | None = (
        None  # images sampled at once; None: the row's on a GPU; on a CPU 1, then more until it takes a while
    )
    compiled: bool = False
    seconds: float | None = None  # of the first batch
    weight_bytes: int | None = None  # of all networks


class TooLarge(Exception):
    """The networks have more weights than `Effort` allows."""


class RandomWeights:
    """`parts.Make`: standard normal weights over the root of the inputs, so that nothing overflows in half precision;
    scales 1, biases 0. `bytes` counts all that was made."""

    def __init__(self, device: torch.device, most: int | None = None):
        self.device, self.most, self.bytes = device, most, 0

    def __call__(
        self,
        constructor: Callable[..., nn.Module],
        *args: Any,
        memory_format: torch.memory_format = torch.contiguous_format,
        **kwargs: Any,
    ) -> nn.Module:
        with torch.device("meta"):
            empty = constructor(*args, **kwargs)
        self.bytes += sum(t.numel() * t.element_size() for t in (*empty.parameters(), *empty.buffers()))
        if self.most is not None and self.bytes > self.most:
            raise TooLarge
        with torch.device(self.device):
            module = constructor(*args, **kwargs)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
                else:
                    parameter.zero_()
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if parameter.dim() == 1 and name == "weight":  # of a norm
                        parameter.fill_(1)
        module = module.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)


def measure(row: Row, parts: CheckParts, device: torch.device, effort: Effort) -> dict[str, Any]:
    """What was measured of the row, or {"row", "skipped": the reason}. Every rank calls it and gets the sum of all."""
    try:
        make = RandomWeights(device, effort.weight_bytes)
        made = parts.untrained(row, device, make)
        if made is None:
            return {"row": row.id, "skipped": f"its network is made by `neon reproduce {row.id}`"}
        backbone = made
        about = {"row": row.id, "weight_bytes": make.bytes}
        result: dict[str, Any] = {**about, **_sampling(row, backbone, make.bytes, device, effort)}
        problem = ""
    except TooLarge:
        problem = "more weights than are tried here; name the row to try"
    except TooSlow:
        problem = f"over {effort.seconds:g} s an image; name the row to wait for it"
    except torch.OutOfMemoryError:
        problem = f"out of memory at {_batch(row, device, effort)} images; give a smaller --batch_size"
    except UserError as error:
        problem = error.message
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        return {"row": row.id, "skipped": problems[0]}
    result["images_per_second"] = sum(gather_objects(result["images_per_second"]))
    try:
        result["training"] = _training(row, backbone, device, result["shape"])
    except torch.OutOfMemoryError:
        result["training"] = {"skipped": "out of memory"}
    if effort.compiled:
        result["compiled"] = _compiled(row, parts, backbone, device, result["batch_size"])
    result["hours"] = hours(row, result, device)
    return result


def _batch(row: Row, device: torch.device, effort: Effort) -> int:
    return effort.batch_size or (row.batch_size if device.type == "cuda" else 1)


def _sampling(row: Row, backbone: Backbone, weights: int, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Counted once, which also warms up, then timed. `weights`: their bytes."""
    count = _batch(row, device, effort)
    _reset_peak(device)
    with Launches(effort.seconds) as counted:
        images = _sample(row, backbone, count)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else counted.memory.peak + weights
    seconds = _seconds(partial(_sample, row, backbone, count), device)
    while device.type == "cpu" and not effort.batch_size and seconds < LONG_ENOUGH and count < row.batch_size:
        count = min(row.batch_size, 4 * count)
        seconds = _seconds(partial(_sample, row, backbone, count), device)
    return {
        "launches": counted.launches,
        "peak_bytes": peak,
        "batch_size": count,
        "images_per_second": count / seconds,
        "shape": list(images.shape[1:]),
    }


def _sample(row: Row, backbone: Backbone, count: int) -> Tensor:
    seeds = list(range(count))
    with float32_precision(row.tf32):
        return backbone.sample(seeds, backbone.assign_labels(seeds, **row.evaluate), **row.evaluate)


def _training(row: Row, backbone: Backbone, device: torch.device, shape: Sequence[int]) -> dict[str, Any]:
    """A step of the row's fine-tune, one micro batch on each rank; on a CPU as few images as the loss takes."""
    size = row.train.micro_batch_size if device.type == "cuda" else row.micro_batch_multiple
    settings = replace(row.train, batch_size=size * world_size(), micro_batch_size=size)
    run = FineTune(backbone, settings, device)
    batch = micro_batch(backbone, shape, size, device)
    with float32_precision(row.train_tf32):
        run.step([batch])  # the optimizer's moments come into being
        _reset_peak(device)
        seconds = _seconds(lambda: run.step([batch]), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    backbone.net.eval().requires_grad_(False).zero_grad()  # half-precision weights beside them cannot be compiled
    slowest = max(gather_objects(seconds))
    return {"images": size, "images_per_second": size * world_size() / slowest, "peak_bytes": peak}


def micro_batch(backbone: Backbone, shape: Sequence[int], size: int, device: torch.device) -> MicroBatch:
    """A micro batch of `size` black images of this shape, as the fine-tune encodes it."""
    first = torch.zeros(1, *shape, dtype=torch.uint8)
    with torch.no_grad():
        prepared = backbone.prepare(first.to(device) if backbone.prepared_key else first)
        prepared = prepared.to(device).expand(size, *prepared.shape[1:])
        labels = torch.zeros(size, dtype=torch.int64, device=device) if backbone.num_classes else None
        generator = torch.Generator(device)
        return backbone.encode(prepared, generator), labels, generator


def _compiled(row: Row, parts: CheckParts, backbone: Backbone, device: torch.device, count: int) -> dict[str, Any]:
    """The first batch, with the compilation, and a later one, with the memory that all of it reserved."""
    sample = partial(_sample, row, backbone, count)
    _reset_peak(device)
    problem, first, rate = None, 0.0, 0.0
    try:
        parts.compile(backbone)
        first = _seconds(sample, device)
        if device.type == "cuda":
            sample()  # records the graphs
        rate = count / _seconds(sample, device)
    except Exception as error:  # of the compiler, which raises many kinds
        problem = one_line(error)
    every = gather_objects((problem, rate))  # where one rank fails, the others wait for it here
    if problems := [text for text, _ in every if text is not None]:
        return {"error": problems[0]}
    result = {"first_seconds": first, "images_per_second": sum(rate for _, rate in every)}
    if device.type == "cuda":
        result["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return result


def hours(row: Row, measured: Mapping[str, Any], device: torch.device) -> dict[str, float | None]:
    """Of S, of the fine-tune, and of the evaluation with its features, on these ranks at these rates."""
    rate, train = measured["images_per_second"], measured["training"].get("images_per_second")
    of_s = row.evaluations(row.generate) / row.evaluations(row.evaluate) if row.evaluations else 1.0
    evaluated = len(parse_seeds(row.evaluate_seeds))
    features = 0.0 if row.detector else evaluated / (detector_rate(device, measured["shape"][-1]) * world_size())
    return {
        "generate": row.num_synthetic * of_s / rate / 3600,
        "finetune": row.train.images / train / 3600 if train else None,
        "evaluate": (evaluated / rate + features) / 3600,
    }


@cache
def detector_rate(device: torch.device, side: int) -> float:
    """Images a second through Inception, with random weights, of this rank."""
    detector = InceptionDetector(InceptionV3(), "check", official=False, device=device)
    count = detector.chunk_images if device.type == "cuda" else DETECTOR_IMAGES
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    detector(images)
    return count / _seconds(lambda: detector(images), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.monotonic()
    work()
    wait(device)
    return time.monotonic() - began


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
