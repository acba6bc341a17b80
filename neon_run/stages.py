"""The four stages: generate, finetune, sweep, calculate_fid. The scripts of every backbone and `neon reproduce` call
these functions with the same `Row`, so that each continues the other's runs.

Every rank makes the same calls. Checks come in one order: files, settings, reference, network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neon_core.backbone import Backbone
from neon_core.distributed import file_hash, on_rank_0
from neon_core.finetune import need_labels, open_set, train_on
from neon_core.merge import NeonWeights
from neon_core.precision import check_precision, float32_precision
from neon_core.synthetic import generate_set
from neon_files.checkpoint import read_state
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_files.tracking import is_tracked, track, track_picture
from neon_metrics.evaluate import Evaluator
from neon_run.cli import check_writable
from neon_run.memory import warn_of_large_batch
from neon_run.merging.files import merge_files
from neon_run.merging.steps import steps_of
from neon_run.row import Row
from neon_run.search.find import SearchPlan, find
from neon_run.search.growing import GrowingSweep
from neon_run.search.sweep import BASE

TRACKED_IMAGES = 36  # of S
TRACKED_METRICS = ("fid", "is_mean", "kid_mean", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Model:
    """A network of a row: its file, and everything needed to load it."""

    row: Row
    checkpoint: Path
    device: torch.device
    frozen: Mapping[str, Path] = field(default_factory=dict)  # option of `load` -> file of a frozen part
    options: Mapping[str, Any] = field(default_factory=dict)  # of `load`, that change the network or its speed
    training: Mapping[str, Any] = field(default_factory=dict)  # of `load`, for a fine-tune

    def load(self, training: bool = False) -> Backbone:
        """The network, anew. Raises UserError."""
        options = {**self.row.load, **self.options, **self.frozen, **(self.training_options if training else {})}
        return self.row.backbone.load(self.checkpoint, self.device, **options)

    @property
    def training_options(self) -> dict[str, Any]:
        return {**self.row.load_training, **self.training}

    @cached_property
    def backbone(self) -> Backbone:
        """The network, loaded once."""
        return self.load()

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the checkpoint and of frozen parts."""
        frozen = {f"{name}_sha256": file_hash(path) for name, path in self.frozen.items()}
        entry = {"entry": self.options["entry"]} if "entry" in self.options else {}
        return {"base_sha256": file_hash(self.checkpoint), **entry, **frozen}

    @property
    def provenance(self) -> dict[str, Any]:
        """The record of theta_base in a set and in a fine-tune on it."""
        return {"row": self.row.id, "base": self.checkpoint.name, **self.hashes}


@dataclass(frozen=True)
class TrainingRun:
    """The execution of a fine-tune; its settings are the row's."""

    seed: int = 0
    mode: str = "ddp"  # ddp | fsdp
    activation_checkpointing: bool = False
    cache_dir: Path | None = None  # of prepared items; None: beside the set
    xflip: bool = False  # also every image mirrored
    max_size: int | None = None  # only so many random images of the set


def check_settings(model: Model, settings: Mapping[str, Any]) -> None:
    """UserError for sampler settings that no network of this kind can use, or this device cannot: before the network is
    loaded."""
    model.row.backbone.check_settings(**settings)
    for name, value in settings.items():
        if name.endswith("precision"):
            check_precision(value, f"--{name}", model.device)


def reduced_precision(model: Model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """For records of what a sampler made: {"computed_in": part -> precision}, or {} where all is float32."""
    precisions = model.backbone.precisions(**settings)
    return {"computed_in": precisions} if set(precisions.values()) - {"fp32"} else {}


def generate(model: Model, out_dir: Path, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """The synthetic set of the row (or of `seeds`) in `out_dir`, new or completed; its manifest. Raises UserError."""
    row = model.row
    check_settings(model, row.generate)
    check_writable(out_dir, "--outdir")
    model.backbone.check_network(**row.generate)
    warn_of_large_batch(model.backbone, row.generate, row.batch_size, model.device)
    with float32_precision(row.generate_tf32 or row.tf32):
        manifest = generate_set(
            model.backbone,
            range(row.synthetic_seed, row.synthetic_seed + row.num_synthetic) if seeds is None else seeds,
            out_dir,
            settings=dict(row.generate),
            batch_size=row.batch_size,
            provenance={**model.provenance, **reduced_precision(model, row.generate)},
            subfolders=row.subfolders,
        )
    if is_tracked():
        images = ImageSet(out_dir, use_labels=False)
        track_picture("S", images.arrays(range(min(TRACKED_IMAGES, len(images)))))
    return manifest


def finetune(model: Model, data: Path, out_dir: Path, run: TrainingRun | None = None) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn, trained on the set `data`; an earlier run in `out_dir` is continued.

    Raises UserError, before anything is trained, where the set is unfinished or does not fit the network.
    """
    run = run or TrainingRun()
    images = open_set(data, max_size=run.max_size, xflip=run.xflip, random_seed=run.seed)
    check_precision(model.row.train.precision, device=model.device)
    check_writable(out_dir, "--outdir")
    backbone = model.load(training=True)
    backbone.check_set(images)  # before the next check, since it knows the labels of this backbone
    if backbone.num_classes:
        need_labels(images, model.checkpoint.name)
    with float32_precision(model.row.train_tf32):
        return train_on(
            images,
            backbone,
            model.row.train,
            out_dir,
            device=model.device,
            provenance={**model.provenance, "options": model.training_options},
            cache_dir=run.cache_dir,
            seed=run.seed,
            mode=run.mode,
            activation_checkpointing=run.activation_checkpointing,
        )


def open_evaluator(reference: str | Path, device: torch.device, **options: Any) -> Evaluator:
    """With every available metric: FID, IS where the detector has classes, KID, precision and recall where
    `real_images` names some. `options` are those of `Evaluator`."""
    metrics = ("fid", *(("kid", "prdc") if options.get("real_images") else ()))
    evaluator = Evaluator(reference, device=device, metrics=metrics, **options)
    if evaluator.detector.num_classes:
        evaluator.metrics = (*evaluator.metrics, "is")
    return evaluator


def open_sweep(model: Model, evaluator: Evaluator, snapshots: Mapping[str, Path], out_dir: Path) -> GrowingSweep:
    """The points of a base and its snapshots in `out_dir`: those measured earlier, and new ones."""
    model.backbone.check_network(**model.row.evaluate)
    warn_of_large_batch(model.backbone, model.row.evaluate, model.row.batch_size, model.device)
    return GrowingSweep(
        model.backbone,
        evaluator,
        snapshots,
        out_dir,
        settings=dict(model.row.evaluate),
        batch_size=model.row.batch_size,
        identity={**model.hashes, "tf32": model.row.tf32, **reduced_precision(model, model.row.evaluate)},
    )


def search(model: Model, sweep: GrowingSweep, plan: SearchPlan, seeds: Sequence[int]) -> dict[str, Any]:
    """The best snapshot, w and settings of the sampler: see `neon_run.search.find.find`."""
    with float32_precision(model.row.tf32):
        return find(model.row, plan, sweep, seeds)


@dataclass(frozen=True)
class SearchImages:
    """The seeds of a search, and those of its best point, which it has not seen; none: it is not measured again."""

    seeds: Sequence[int]
    final_seeds: Sequence[int] = ()


def sweep(
    model: Model,
    evaluator: Evaluator,
    snapshots: Mapping[str, Path],
    out_dir: Path,
    plan: SearchPlan,
    images: SearchImages,
) -> dict[str, Any]:
    """`search`, then every metric of the best point, and its network as `out_dir`/neon.safetensors, unless the base is
    best. The backbone holds theta_base again afterwards."""
    check_writable(out_dir, "--out_dir")
    if (out_dir / "neon.safetensors").exists() and not (out_dir / "points").exists():
        raise UserError(f"{out_dir}: holds a neon.safetensors of something else; name another --out_dir")
    points = open_sweep(model, evaluator, snapshots, out_dir)
    result = search(model, points, plan, images.seeds)
    best = result["best"]
    count = plan.deciding_images if plan.kind == "quick" else model.row.grid.num_images
    with float32_precision(model.row.tf32):
        measured = points.measure(
            best["snapshot"], best["w"], images.final_seeds or images.seeds[:count], **best["settings"]
        )
    if "not_finite" in measured:
        raise UserError(f"the best setting of the search, w = {best['w']:g}: {measured['not_finite']}")
    if measured["snapshot"] != BASE:
        merged = out_dir / "neon.safetensors"
        steps = steps_of(model.backbone.net, best["w"])
        entries = (model.options.get("entry"), None)
        synthetic = snapshots[best["snapshot"]]
        on_rank_0(lambda: merge_files(model.checkpoint, synthetic, steps, merged, entries=entries))
        measured = {**measured, "checkpoint": str(merged)}
    points.restore()
    return {**result, "result": {**measured, "network_config": model.backbone.network_config()}}


def calculate_fid(
    model: Model,
    evaluator: Evaluator,
    seeds: Sequence[int],
    *,
    work_dir: Path | None = None,
    save_images: Path | None = None,
    synthetic: Path | None = None,
) -> dict[str, Any]:
    """Every metric of the evaluator, of the images of `seeds`; with `synthetic`, a fine-tuned checkpoint, of
    theta_base - w (theta_syn - theta_base), w being the row's. Raises UserError."""
    row, backbone = model.row, model.backbone
    backbone.check_network(**row.evaluate)
    warn_of_large_batch(backbone, row.evaluate, row.batch_size, model.device)
    identity: dict[str, Any] = {**model.hashes, "tf32": row.tf32, **reduced_precision(model, row.evaluate)}
    if synthetic is not None:
        theta_base = {name: value.detach().cpu().clone() for name, value in backbone.net.state_dict().items()}
        NeonWeights(backbone.net, theta_base, read_state(synthetic, theta_base)).set(row.w)
        identity |= {"w": row.w, "synthetic_sha256": file_hash(synthetic), "synthetic": str(synthetic)}
    with float32_precision(row.tf32):
        result = evaluator(
            backbone,
            seeds,
            settings=dict(row.evaluate),
            batch_size=row.batch_size,
            file_order=backbone.file_order(backbone.assign_labels(seeds, **row.evaluate)),
            work_dir=work_dir,
            identity=identity,
            save_images=save_images,
        )
    track({f"evaluation/{name}": value for name, value in result.items() if name in TRACKED_METRICS}, len(seeds))
    described = {"row": row.id, "checkpoint": str(model.checkpoint), "network_config": backbone.network_config()}
    return {**result, **identity, **described, "img_size": backbone.img_size}


def with_settings(row: Row, **changes: Any) -> Row:
    """The row with those fields that are not None."""
    return replace(row, **{name: value for name, value in changes.items() if value is not None})


def check_image_size(backbone: Backbone, img_size: int | None, class_num: int | None) -> None:
    """UserError where --img_size or --class_num contradicts the network."""
    if img_size is not None and img_size != backbone.img_size:
        raise UserError(
            f"--img_size {img_size}: this script and checkpoint make images of {backbone.img_size} pixels a side"
        )
    if class_num is not None and class_num != backbone.num_classes:
        raise UserError(f"--class_num {class_num}: this model has {backbone.num_classes} classes")
