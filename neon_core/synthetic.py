"""The synthetic set S: lossless images and labels in EDM's layout, with a manifest that says how they were made.

    <out>/manifest.json                       every setting, the base's hash, written first
    <out>/000000/000123_label7.png            one image per seed (no label part where unconditional)
    <out>/dataset.json                        labels, written last: a set that has it is complete

A killed run is continued by the same command, on any number of ranks: finished batches are kept.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, file_hash, gather_objects, is_main, rank, world_size
from neon_core.pixels import sample
from neon_core.seeds import check_seeds, deal, format_seeds, global_batches
from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.run_files import read_record


def image_name(seed: int, label: int | None, subfolders: bool = True) -> str:
    """ "005000/005999_label7.png": the official naming."""
    name = f"{seed:06d}.png" if label is None else f"{seed:06d}_label{label}.png"
    return f"{seed - seed % 1000:06d}/{name}" if subfolders else name


def origin(recipe: str | None, base: Path) -> dict[str, str | None]:
    """What a set, and a fine-tune on it, say of theta_base: the row's name, the file's name, its hash."""
    return {"recipe": recipe, "base": base.name, "base_sha256": file_hash(base)}


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
    """Make, or finish making, the images of `seeds` under `out_dir`. Returns the manifest.

    `settings` go to `backbone.sample`; `provenance` (`origin` and the like) is recorded. Every rank calls it.
    Raises UserError where the folder holds another set, a seed twice, or the network gives NaN (NotFiniteImages).
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
    if is_main():
        _claim(out_dir, manifest)
    barrier()

    names = [image_name(seed, None if labels is None else int(labels[i]), subfolders) for i, seed in enumerate(seeds)]
    batches = global_batches(len(seeds), batch_size)
    done = [b for b, part in enumerate(batches) if all((out_dir / names[i]).exists() for i in part)]
    done = gather_objects(done)[0]  # rank 0's view: files may appear while the others look
    mine = deal(len(batches), rank(), world_size(), done)
    bar = tqdm(total=len(seeds), initial=sum(len(batches[b]) for b in done), unit="img", desc="generate",
               disable=not (progress and is_main()))  # fmt: skip
    with ThreadPoolExecutor(max_workers=4) as writers:
        pending = []
        for number, b in enumerate(mine):
            part = list(batches[b])
            images = sample(backbone, [seeds[i] for i in part], None if labels is None else labels[part], settings)
            for future in pending:
                future.result()
            pending = [
                writers.submit(write_png, out_dir / names[i], image)
                for i, image in zip(part, images.cpu(), strict=True)
            ]
            left = len(seeds) - bar.n
            bar.update(min(left, len(part) * world_size()) if number < len(mine) - 1 else left)
        for future in pending:
            future.result()
    bar.close()
    barrier()
    if is_main():
        entries = None if labels is None else sorted([name, int(k)] for name, k in zip(names, labels, strict=True))
        with atomic_path(out_dir / "dataset.json") as temporary:
            temporary.write_text(json.dumps({"labels": entries}, indent=2))
    barrier()
    return manifest


def read_manifest(path: str | Path) -> dict | None:
    """The manifest of a set made here, None for a set from elsewhere; UserError where it was not finished."""
    path = Path(path)
    if not (path / "manifest.json").exists():
        return None
    manifest = read_record(path / "manifest.json")
    if not (path / "dataset.json").exists():
        raise UserError(f"{path}: this synthetic set was not finished; run the same generate command again")
    return manifest


def write_zip(folder: str | Path, archive: str | Path) -> Path:
    """A finished set as one uncompressed .zip in EDM's layout (images and dataset.json). Raises UserError."""
    folder, archive = Path(folder), Path(archive)
    if not (folder / "dataset.json").exists():
        raise UserError(f"{folder}: no dataset.json, so this is not a finished set; run its generate command again")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    with atomic_path(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as target:
        for name in tqdm([*names, "dataset.json"], desc="zip", disable=not is_main()):
            target.write(folder / name, name)
    return archive


def _claim(out_dir: Path, manifest: dict) -> None:
    """Write the manifest of a new set, or check that the one found is ours to continue."""
    found = out_dir / "manifest.json"
    if found.exists():
        earlier = read_record(found)
        if earlier != manifest:
            key = next(k for k in sorted({*earlier, *manifest}) if earlier.get(k) != manifest.get(k))
            raise UserError(
                f"{out_dir}: holds a set made with {key} = {earlier.get(key)!r}, not {manifest.get(key)!r}; "
                "name another --outdir, or remove that set"
            )
    else:
        if out_dir.exists() and any(out_dir.rglob("*.png")):
            raise UserError(f"{out_dir}: holds images but no manifest.json; name an empty or new --outdir")
        out_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(found) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def write_images(folder: Path, names: Sequence[str], images: Tensor) -> None:
    """PNGs of uint8 [B, C, H, W] under `folder`."""
    for name, image in zip(names, images.cpu(), strict=True):
        write_png(folder / name, image)


def write_png(path: Path, image: Tensor) -> None:
    """Lossless and atomic; uint8 [C, H, W] with one or three channels."""
    array = image.numpy()
    picture = PIL.Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=False) as temporary:
        picture.save(temporary, format="png", compress_level=3)


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
