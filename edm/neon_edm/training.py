"""theta_base and its synthetic set -> theta_syn: the checks before a fine-tune, and the call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neon_core.finetune import open_set, train_on
from neon_core.synthetic import origin
from neon_edm.backbone import EDMBackbone
from neon_edm.layers import FourierEmbedding
from neon_edm.networks import SongUNet
from neon_edm.recipes import EDMRecipe
from neon_files.downloads import fetch
from neon_files.errors import UserError
from neon_files.image_set import ImageSet


def fine_tune(
    base: str | Path,
    data: str | Path,
    recipe: EDMRecipe,
    out_dir: str | Path,
    *,
    xflip: bool = False,
    claims: dict[str, Any] | None = None,
    device: torch.device,
    **options: Any,
) -> dict[int, Path]:
    """Images seen -> snapshot of theta_syn. Every rank calls it; an earlier run in `out_dir` is continued.

    `claims` are what the official train.py's flags say about the network; `options` (seed) go to `self_train`. Raises
    UserError, before anything is trained, where they are wrong, or the set is unfinished or does not fit the network.
    """
    path = fetch(base)
    backbone = EDMBackbone.load(path, recipe, device)
    check_claims(claims or {}, backbone, path)
    images = open_set(data, use_labels=backbone.num_classes > 0, xflip=xflip)
    check_fits(images, backbone, path)
    provenance = {**origin(recipe.name, path), "augment": recipe.augment, "dropout": recipe.dropout}
    return train_on(images, backbone, recipe.train, out_dir, device=device, provenance=provenance, **options)


def check_claims(claims: dict[str, Any], backbone: EDMBackbone, network: Path) -> None:
    """UserError where one of --cond, --arch, --precond, --cres contradicts the network; None claims nothing."""
    config, unet = backbone.network_config(), backbone.net.model
    song = "ncsnpp" if isinstance(unet.map_noise, FourierEmbedding) else "ddpmpp"
    widths = config["kwargs"].get("channel_mult")
    found = {
        "cond": backbone.num_classes > 0,
        "arch": song if isinstance(unet, SongUNet) else "adm",
        "precond": config["class"].removesuffix("Precond").lower(),
        "cres": None if widths is None else ",".join(map(str, widths)),
    }
    for flag, value in claims.items():
        if value is not None and found[flag] is not None and value != found[flag]:
            raise UserError(
                f"--{flag} {value}: {network.name} has {found[flag]}; leave the flag out or name its network"
            )


def check_fits(images: ImageSet, backbone: EDMBackbone, network: Path) -> None:
    """UserError where the images have another shape than the network's, or it needs labels that they lack."""
    wanted = (backbone.net.img_channels, backbone.img_size, backbone.img_size)
    if images.shape != wanted:
        raise UserError(f"{images.path}: images of shape {images.shape}, but {network.name} makes {wanted}")
    if backbone.num_classes and not images.has_labels:
        raise UserError(
            f"{images.path}: no labels, but {network.name} is conditional; if the files are named like "
            f"000123_label7.png, run: PYTHONPATH=edm:. python -m neon_edm.data --root {images.path}"
        )
