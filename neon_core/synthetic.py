"""The synthetic set S: lossless images and labels in EDM's layout, with a manifest of all settings.

    <out>/manifest.json                       every setting, the base's hash, written first; at the end a digest of all
    <out>/000000/000123_label7.png            one image per seed (no label part where unconditional)
    <out>/dataset.json                        labels, written when the images are on the disk: the set is complete

The same command continues a killed run, and repairs a set with lost or damaged images, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, gather_objects, is_main, rank, world_size
from neon_core.pixels import sample
from neon_core.seeds import check_seeds, deal, format_seeds, global_batches
from neon_files.atomic import atomic_path, flush, remove_stale_below, write_json
from neon_files.errors import UserError, say
from neon_files.image_set import ImageSet
from neon_files.progress import progress_bar
from neon_files.run_files import read_record


def image_name(seed: int, label: int | None, subfolders: bool = True, suffix: str = ".png") -> str:
    """ "005000/005999_label7.png": the official naming."""
    name = f"{seed:06d}{suffix}" if label is None else f"{seed:06d}_label{label}{suffix}"
    return f"{seed - seed % 1000:06d}/{name}" if subfolders else name


def generate_set(
    backbone: Backbone,
    seeds: Sequence[int],
    out_dir: str | Path,
    *,
    settings: dict,
    batch_size: int,
    provenance: dict | None = None,
    subfolders: bool = True,
    progress: bool = True,
) -> dict:
    """Generate the images of `seeds` under `out_dir`, or the missing ones. Returns the manifest.

    `settings` go to `backbone.sample`; `provenance` (`origin` and the like) is recorded. Every rank calls it. Existing
    files are read, and generated again where they are damaged. Raises UserError where the folder holds another set, a
    seed occurs twice, or the network gives NaN (NotFiniteImages).
    """
    out_dir = Path(out_dir)
    check_seeds(seeds)
    if len(set(seeds)) != len(seeds):
        raise UserError("--seeds: a seed occurs twice; each names one file of the set, so list it once")
    labels = backbone.assign_labels(seeds, **settings)
    manifest = {
        "format": "neon-synthetic-set-1",
        "seeds": format_seeds(seeds),
        "num_images": len(seeds),
        "batch_size": batch_size,
        "settings": settings,
        "img_size": backbone.img_size,
        "num_classes": backbone.num_classes,
        "subfolders": subfolders,
        **(provenance or {}),
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    versions: list[str] = []
    if is_main():
        versions = _claim(out_dir, manifest)
        remove_stale_below(out_dir)
    versions = broadcast_object(versions)

    suffix, write = (".npy", write_array) if backbone.arrays(**settings) else (".png", write_png)
    classes = [None] * len(seeds) if labels is None else labels.tolist()
    names = [image_name(seed, k, subfolders, suffix) for seed, k in zip(seeds, classes, strict=True)]
    batches = global_batches(len(seeds), batch_size)
    digests = _whole_batches(out_dir, names, batches, backbone.img_size)
    left = len(batches) - len(digests)
    if left and torch.__version__ not in versions:
        if versions:
            say(
                f"{out_dir}: begun with torch {versions[-1]}, goes on with {torch.__version__}, whose images may differ"
            )
        versions = [*versions, str(torch.__version__)]
        if is_main():
            write_json(out_dir / "manifest.json", {**manifest, "torch": versions})
    if versions:  # sets of earlier releases have none, and keep their digest
        manifest["torch"] = versions
    finished = broadcast_object((out_dir / "dataset.json").exists()) and not left
    if is_main() and not finished:
        (out_dir / "dataset.json").unlink(missing_ok=True)  # it certifies that all images exist
    share = deal(len(batches), rank(), world_size(), list(digests))
    bar = progress_bar(total=len(seeds), initial=sum(len(batches[b]) for b in digests), unit="img", desc="generate",
               disable=not (progress and is_main()))  # fmt: skip
    added: dict[int, int] = {}
    with ThreadPoolExecutor(max_workers=4) as writers:
        pending: dict[int, list[Future]] = {}
        for number, b in enumerate(share):
            part = list(batches[b])
            images = sample(backbone, [seeds[i] for i in part], None if labels is None else labels[part], settings)
            added |= _written(pending)
            pending = {b: [writers.submit(write, out_dir / names[i], image)
                           for i, image in zip(part, images.cpu(), strict=True)]}  # fmt: skip
            rest = len(seeds) - bar.n
            bar.update(min(rest, len(part) * world_size()) if number < len(share) - 1 else rest)
        added |= _written(pending)
    bar.close()
    if not finished:
        kept = deal(len(digests), rank(), world_size())
        _flush(out_dir, [names[i] for b in [*added, *(sorted(digests)[k] for k in kept)] for i in batches[b]])
    for part in gather_objects(added):
        digests |= part
    manifest["images_sha256"] = f"{sum(digests.values()) % (1 << 256):064x}"
    if is_main():
        if read_record(out_dir / "manifest.json") != manifest:
            write_json(out_dir / "manifest.json", manifest)
        entries = None if labels is None else sorted([name, int(k)] for name, k in zip(names, labels, strict=True))
        with atomic_path(out_dir / "dataset.json") as temporary:
            temporary.write_text(json.dumps({"labels": entries}, indent=2), encoding="utf-8")
    barrier()
    return manifest


def _whole_batches(out_dir: Path, names: Sequence[str], batches: Sequence[range], size: int) -> dict[int, int]:
    """Batch -> sum of its images' digests, for those of which every image can be read; each rank reads its share."""

    def digest(name: str) -> int | None:
        try:
            data = (out_dir / name).read_bytes()
            if name.endswith(".npy"):
                np.load(io.BytesIO(data), allow_pickle=False)
                return _digest(name.rpartition("/")[2], data)
            with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                fits = image.size == (size, size)
                image.verify()  # every chunk's check sum
        except (OSError, SyntaxError, ValueError):  # missing, cut short, overwritten
            return None
        return _digest(name.rpartition("/")[2], data) if fits else None

    whole = {}
    with ThreadPoolExecutor(max_workers=8) as readers:
        for b in deal(len(batches), rank(), world_size()):
            values = [value for value in readers.map(digest, [names[i] for i in batches[b]]) if value is not None]
            if len(values) == len(batches[b]):
                whole[b] = sum(values)
    return {b: value for part in gather_objects(whole) for b, value in part.items()}


def _digest(name: str, data: bytes) -> int:
    """Of one image file; digests are added up, so that ranks need no common order."""
    return int.from_bytes(hashlib.sha256(name.encode() + b"\0" + data).digest(), "big")


def _written(pending: dict[int, list[Future]]) -> dict[int, int]:
    return {b: sum(future.result() for future in futures) for b, futures in pending.items()}


def _flush(out_dir: Path, names: Sequence[str]) -> None:
    """Force images, and the folders that name them, to the disk."""
    folders = {(out_dir / name).parent for name in names} | {out_dir}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in pool.map(flush, [*(out_dir / name for name in names), *folders]):
            pass


def read_manifest(path: str | Path) -> dict | None:
    """The manifest of a generated set, None for any other set; UserError where images are missing."""
    return ImageSet(path, use_labels=False).manifest


def withdraw_unless_whole(out_dir: str | Path) -> None:
    """Delete the listing of a generated set with missing images, so that `generate_set` is called again."""
    try:
        ImageSet(out_dir, use_labels=False)
    except UserError:
        (Path(out_dir) / "dataset.json").unlink(missing_ok=True)


def _claim(out_dir: Path, manifest: dict) -> list[str]:
    """Write the manifest of a new set, or check the settings of the existing one. Returns the versions of torch that
    its images were generated with: equal seeds give equal images only within one version."""
    path = out_dir / "manifest.json"
    if path.exists():
        earlier = read_record(path)
        versions = earlier.pop("torch", [])
        earlier.pop("images_sha256", None)  # added at the end
        if earlier != manifest:
            key = next(k for k in sorted({*earlier, *manifest}) if earlier.get(k) != manifest.get(k))
            raise UserError(
                f"{out_dir}: holds a set made with {key} = {earlier.get(key)!r}, not {manifest.get(key)!r}; "
                "name another --outdir, or remove that set"
            )
        return versions
    else:
        if out_dir.exists() and any(out_dir.rglob("*.png")):
            raise UserError(f"{out_dir}: holds images but no manifest.json; name an empty or new --outdir")
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest)
        return []


def write_images(folder: Path, names: Sequence[str], images: Tensor) -> None:
    """PNGs of uint8 [B, C, H, W] under `folder`."""
    for name, image in zip(names, images.cpu(), strict=True):
        write_png(folder / name, image)


def write_png(path: Path, image: Tensor) -> int:
    """Lossless and atomic; uint8 [C, H, W] with one or three channels. Returns a digest of the file."""
    array = image.numpy()
    picture = PIL.Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", compress_level=3)
    return _write(path, buffer)


def write_array(path: Path, item: Tensor) -> int:
    """As `write_png`, of any numbers [C, H, W], as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, item.numpy(), allow_pickle=False)
    return _write(path, buffer)


def _write(path: Path, buffer: io.BytesIO) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=False) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return _digest(path.name, buffer.getvalue())


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """UserError where a label is outside 0 .. num_classes-1, or labels are given to an unconditional network."""
    if labels is None:
        return
    if num_classes == 0:
        raise UserError("labels were given, but this network is unconditional; leave them out")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} is out of range; this network has classes 0 to {num_classes - 1}")
    assert labels.dtype == torch.int64
