"""`neon fid IMAGES` and `neon reference IMAGES`: metrics and reference statistics of images that lie on the disk, from
whatever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neon_core.distributed import agree, is_main, print0, session
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_metrics.detectors import open_detector
from neon_metrics.image_statistics import check_images, reference_of, take_in
from neon_metrics.reference import write_reference
from neon_run import flags as f
from neon_run.backbones import find_row
from neon_run.cli import check_writable, measured_line, write_result
from neon_run.commands import make_evaluator

IMAGES = click.Argument(["images"], metavar="IMAGES", type=f.PATH)
BATCH_SIZE = f.flag("--batch_size", "--batch", "batch_size", type=f.COUNT, default=64, help="Images at once.")
REFERENCE = f.flag("--ref", "--fid_stats", "reference", required=True, metavar="PATH|URL",
                   help="Reference statistics, .npz.")  # fmt: skip


def are_images(name: str) -> bool:
    """Whether it names a folder or .zip here, and not a row. UserError where it can be both."""
    path = Path(name)
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip")):
        return False
    try:
        row = find_row(name)
    except UserError:
        return True
    raise UserError(f"{name}: is the row {row.id} and lies here too; write ./{name} for the images, or cd elsewhere")


def open_images(path: Path) -> ImageSet:
    """The images of a folder or .zip, the same on every rank, all of which can be read. Raises UserError."""
    images = agree(path, lambda: ImageSet(path, use_labels=False), lambda found: f"{len(found)} images")
    check_images(images)
    return images


def measure(images: Path, reference: str, device: str, batch_size: int, json_path: Path | None, **values: Any) -> None:
    """Distance of the images in IMAGES, a folder or .zip, to reference statistics."""
    with session(device) as where:
        found = open_images(images)
        evaluator = make_evaluator({"--fid_stats": reference}, values, where)
        total = take_in(evaluator.new_accumulator(len(found)), found, where, batch_size, progress=True)
        about = {
            "images": str(images),
            "num_images": len(found),
            "digest": found.digest,
            "reference": evaluator.reference.name,
            "detector": evaluator.detector.name,
            "detector_is_official": evaluator.detector.official,
        }
        result = {**evaluator.compute(total, batch_size), **about}
        write_result(result, measured_line(result, [f"{len(found)} images"]), json_path)


def make_reference(images: Path, out: Path, detector: Path | None, device: str, batch_size: int) -> None:
    """Reference statistics of the images in IMAGES, a folder or .zip: mean and covariance of their features, which
    --ref and `improve` take."""
    check_writable(out.resolve().parent, "-o")
    if out.suffix != ".npz":
        raise UserError(f"-o {out}: name a file that ends in .npz")
    with session(device) as where:
        found = open_images(images)
        opened = open_detector(detector, where)
        reference = reference_of(found, opened, where, batch_size)
        if is_main():
            write_reference(out, reference)
        print0(f"{out} | {len(found)} images | {opened.name} | {len(reference.mu)} features")


measure_command = click.Command(
    "fid",
    params=[IMAGES, REFERENCE, *f.metric_flags(None)[1:], BATCH_SIZE, f.DEVICE, f.JSON],
    callback=measure,
    help=measure.__doc__,
    context_settings={"help_option_names": ["-h", "--help"]},
)
OUT = f.flag("-o", "--out", "out", required=True, type=f.FILE, help="The .npz to write.")
reference_command = click.Command(
    "reference", params=[IMAGES, OUT, f.DETECTOR, BATCH_SIZE, f.DEVICE], callback=make_reference,
    help=make_reference.__doc__,
)  # fmt: skip
