"""Small IMM models and the files around them."""

from pathlib import Path

import torch

from neon_core.kl_vae import AutoencoderKL
from neon_files.checkpoint import write_checkpoint
from neon_imm.backbone import IMMBackbone
from neon_imm.precond import IMMPrecond
from neon_imm.rows import ROWS
from neon_imm.vae_files import save_vae

LATENT = {
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "num_classes": 10,
    "model_type": "DiT",
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "temb_type": "stride",
}
PIXEL = {
    "img_resolution": 8,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
    "f_type": "simple_edm",
    "eps": 0.006,
}
VAE = {"embed_dim": 4, "ch_mult": (1, 2, 2), "ch": 32, "num_res_blocks": 1, "attn_resolutions": ()}  # stride 4


BY_NAME = {row.name: row for row in ROWS}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that are nowhere zero: a fresh DiT ignores its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(p[0].numel(), 1) if p.ndim > 1 else 25
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return module


def write_net(path: Path, kwargs: dict, seed: int = 0, **config) -> Path:
    state = randomised(IMMPrecond(**kwargs), seed).state_dict()
    write_checkpoint(path, state, config={"class": "IMMPrecond", "kwargs": kwargs, **config})
    return path


def write_vae(path: Path, **kwargs) -> Path:
    torch.manual_seed(0)
    save_vae(path, AutoencoderKL(**{**VAE, **kwargs}))
    return path


def latent_backbone(folder: Path, **kwargs) -> IMMBackbone:
    """A DiT of 8x8 latents of 32x32 images."""
    net = write_net(folder / "dit.safetensors", {**LATENT, **kwargs})
    vae = write_vae(folder / "vae.safetensors")
    return IMMBackbone.load(net, torch.device("cpu"), **BY_NAME["imagenet_256"].load, vae=vae)


def pixel_backbone(folder: Path, **kwargs) -> IMMBackbone:
    """An unconditional U-Net of 8x8 images."""
    net = write_net(folder / "unet.safetensors", {**PIXEL, **kwargs})
    return IMMBackbone.load(net, torch.device("cpu"), **BY_NAME["cifar10"].load)
