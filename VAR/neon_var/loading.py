"""VAR and VQVAE files, published or written here -> networks, with errors that name the setting that fits a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from neon_files.checkpoint import Checkpoint, load_strict, read_checkpoint
from neon_files.errors import UserError
from neon_files.home import CHECKOUT, home
from neon_var.architectures import ARCHITECTURES, VAE_FILE, tokenizer
from neon_var.var import VAR
from neon_var.vqvae import VQVAE

OFFICIAL_PLACES = (  # of the official scripts
    Path(VAE_FILE),
    CHECKOUT / "VAR" / "VAR_imagenet_256" / "pretrained" / VAE_FILE,
    CHECKOUT / "VAR" / "VAR_imagenet_512" / "pretrained" / VAE_FILE,
)


def load_var(
    path: str | Path, architecture: str | None = None, depth: int | None = None, entry: str | None = None
) -> tuple[VAR, dict[str, Any]]:
    """(network, its constructor arguments). A file written here has its configuration; a published one is read as the
    network of `architecture`, of another `depth` if given. Raises UserError that names the setting that fits."""
    checkpoint = read_checkpoint(path, entry)
    if "quantize.embedding.weight" in checkpoint.state:
        raise UserError(f"{checkpoint.path}: is a VQVAE, not a VAR; give it as --vae_ckpt")
    if checkpoint.config is not None:
        kwargs = _checkpoint_config(checkpoint, "VAR")
        if depth is not None and depth != kwargs["depth"]:
            raise UserError(
                f"--model_depth {depth}: {checkpoint.path} holds depth {kwargs['depth']}; leave the flag out"
            )
    else:
        if architecture not in ARCHITECTURES:
            raise UserError(f"{checkpoint.path}: has no configuration; choose --preset {' or '.join(ARCHITECTURES)}")
        kwargs = ARCHITECTURES[architecture].network(depth)
        _check_size(checkpoint, kwargs)
    side = 16 * kwargs["patch_nums"][-1]
    fitting = [name for name, a in ARCHITECTURES.items() if a.img_size == side]
    if architecture in ARCHITECTURES and fitting and architecture not in fitting:
        raise UserError(f"{checkpoint.path}: makes images of {side} pixels a side; use the preset {fitting[0]}")
    with torch.device("meta"):
        net = VAR(**kwargs)
    load_strict(net, checkpoint)
    return net, kwargs


def load_vae(path: str | Path | None, var: VAR) -> VQVAE:
    """The tokenizer for `var`, frozen. Raises UserError where it is missing, is none, or has another vocabulary."""
    checkpoint = read_checkpoint(find_vae(path))
    state = dict(checkpoint.state)
    if "quantize.embedding.weight" not in state:
        raise UserError(f"{checkpoint.path}: is not a VQVAE; --vae_ckpt requires {VAE_FILE} or a VQVAE of that kind")
    vocabulary = tuple(state["quantize.embedding.weight"].shape)
    if vocabulary != (var.vocab_size, var.Cvae):
        raise UserError(
            f"{checkpoint.path}: has {vocabulary[0]} codes of width {vocabulary[1]}, but the VAR was trained on "
            f"{var.vocab_size} of width {var.Cvae}; name the VQVAE that belongs to it with --vae_ckpt"
        )
    kwargs = tokenizer(var.patch_nums) if checkpoint.config is None else _checkpoint_config(checkpoint, "VQVAE")
    kwargs["v_patch_nums"] = var.patch_nums  # one file serves all resolutions
    with torch.device("meta"):
        vae = VQVAE(**kwargs)
    hits = "quantize.ema_vocab_hit_SV"  # usage statistics for as many scales as the VQVAE was trained with
    if hits in state and len(state[hits]) != len(var.patch_nums):
        state[hits] = torch.zeros(len(var.patch_nums), var.vocab_size)
    load_strict(vae, dataclasses.replace(checkpoint, state=state))
    return vae


def find_vae(path: str | Path | None) -> Path:
    """`path`, or the first of the usual places that holds the published tokenizer."""
    if path is not None:
        return Path(path)
    ours = home() / "checkpoints" / VAE_FILE
    present = (place for place in (ours, *OFFICIAL_PLACES) if place.exists())
    return next(present, ours)  # if missing, read_checkpoint reports the command that fetches it


def _checkpoint_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    config = checkpoint.config or {}
    if config.get("class") != name:
        raise UserError(f"{checkpoint.path}: holds a {config.get('class')}, not a {name}")
    kwargs = dict(config["kwargs"])
    key = "patch_nums" if name == "VAR" else "v_patch_nums"
    kwargs[key] = tuple(kwargs[key])
    return kwargs


def _check_size(checkpoint: Checkpoint, kwargs: dict[str, Any]) -> None:
    """UserError naming depth and resolution of the file where they are not those of `kwargs`."""
    state = checkpoint.state
    if "pos_1LC" not in state or "class_emb.weight" not in state:
        raise UserError(f"{checkpoint.path}: is not a VAR checkpoint (no pos_1LC, no class_emb.weight)")
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    depth, tokens = max(blocks, default=-1) + 1, state["pos_1LC"].shape[1]
    fitting = [name for name, a in ARCHITECTURES.items() if sum(p * p for p in a.patch_nums) == tokens]
    if tokens != sum(p * p for p in kwargs["patch_nums"]):
        preset = f"--preset {fitting[0]}" if fitting else "no preset"
        raise UserError(f"{checkpoint.path}: is a VAR-d{depth} with {tokens} tokens per image; it fits {preset}")
    if depth != kwargs["depth"]:
        raise UserError(f"{checkpoint.path}: is a VAR-d{depth}, not d{kwargs['depth']}; add --model_depth {depth}")
