"""What imm/calculate_fid.py does, apart from its flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neon_core.distributed import file_hash, print0
from neon_core.merge import NeonWeights
from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_imm.backbone import IMMBackbone
from neon_imm.labels import file_order
from neon_imm.recipes import IMMRecipe
from neon_metrics.evaluate import Evaluator
from neon_run.cli import measured_line


def load_backbone(
    checkpoint: Path,
    recipe: IMMRecipe,
    device: torch.device,
    vae: str | None = None,
    compiled: bool = False,
    img_size: int | None = None,
) -> IMMBackbone:
    """Raises UserError also where the images would not have `img_size` pixels."""
    backbone = IMMBackbone.load(checkpoint, recipe, device, vae=vae, compiled=compiled)
    if img_size is not None and img_size != backbone.img_size:
        raise UserError(f"--img_size {img_size}: {checkpoint.name} makes images of {backbone.img_size} pixels")
    return backbone


def merge_in_place(backbone: IMMBackbone, synthetic: Path, w: float) -> None:
    """Move the backbone's network to theta_base - w (theta_syn - theta_base)."""
    base = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    NeonWeights(backbone.net, base, read_checkpoint(synthetic).state).set(w)


def evaluate(
    backbone: IMMBackbone,
    evaluator: Evaluator,
    seeds: Sequence[int],
    settings: dict[str, Any],
    *,
    files: dict[str, Path],
    w: float | None,
    **options: Any,
) -> dict[str, Any]:
    """The metrics, with the files (name -> path) and w that made the network. `options` are those of the evaluator."""
    backbone.check_settings(**settings)
    print0(f"sampling {len(seeds)} images with {settings}", file=sys.stderr)
    in_order = settings.get("label_rule", "in_order") == "in_order"
    if backbone.num_classes and in_order and (rest := len(seeds) % backbone.num_classes):
        share = len(seeds) // backbone.num_classes
        print0(f"{share} images per class, {share + 1} for the first {rest} classes", file=sys.stderr)
    identity = {"w": w, **{f"{name}_sha256": file_hash(path) for name, path in files.items()}}
    labels = backbone.assign_labels(seeds, **settings)
    order = None if labels is None else file_order(labels)  # of the Inception Score's parts
    result = evaluator(backbone, seeds, settings=settings, identity=identity, file_order=order, **options)
    return {**result, **identity, **{name: str(path) for name, path in files.items()}, "img_size": backbone.img_size}


def result_line(result: dict[str, Any]) -> str:
    """One line: the metrics, and what they depend on."""
    settings = result["settings"]
    steps = settings.get("num_steps", 8)
    if settings.get("discretization") == "mid_nt":
        steps = 1 + len(settings.get("mid_nt", ()))
    parts = [f"images={result['num_images']}", f"steps={steps}", f"cfg={settings.get('cfg')}"]
    parts += [] if result.get("w") is None else [f"w={result['w']:g}"]
    return measured_line(result, [*parts, f"ckpt={Path(result['checkpoint']).stem}"], digits=6)
