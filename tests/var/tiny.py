"""A VAR of 50,000 parameters and its VQVAE, 48 px images, for tests that take milliseconds."""

from pathlib import Path

import torch

from neon_files.checkpoint import write_checkpoint
from neon_run.check.numbers import fill
from neon_var.backbone import VARBackbone
from neon_var.var import VAR
from neon_var.vqvae import VQVAE

PATCH_NUMS = (1, 2, 3)
VAE_KWARGS = {"vocab_size": 64, "z_channels": 8, "ch": 32, "v_patch_nums": PATCH_NUMS}
VAR_KWARGS = {
    "vocab_size": 64,
    "Cvae": 8,
    "num_classes": 10,
    "depth": 3,
    "embed_dim": 32,
    "num_heads": 2,
    "drop_path_rate": 0.2,
    "patch_nums": PATCH_NUMS,
}


def tiny_vae() -> VQVAE:
    return fill(VQVAE(**VAE_KWARGS)).eval()


def tiny_var(**changes) -> VAR:
    net = fill(VAR(**VAR_KWARGS | changes)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("scale_mul_1H11"):
            parameter.data.fill_(2.0)  # filled values mean almost uniform attention
    return net


def tiny_backbone(token_crops: int = 0, crop: str = "official", **changes) -> VARBackbone:
    return VARBackbone(tiny_var(**changes), tiny_vae(), VAR_KWARGS | changes, token_crops, crop)


def write_tiny(folder: Path, **changes) -> tuple[Path, Path]:
    """(VAR file, VQVAE file), as our own tools would write them."""
    var, vae = folder / "var.safetensors", folder / "vae.safetensors"
    config = {"class": "VAR", "kwargs": VAR_KWARGS | changes}
    write_checkpoint(var, tiny_var(**changes).state_dict(), config=config)
    write_checkpoint(vae, tiny_vae().state_dict(), config={"class": "VQVAE", "kwargs": VAE_KWARGS})
    return var, vae


def random_tokens(batch: int, seed: int = 0) -> torch.Tensor:
    """int64 [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (batch, sum(p * p for p in PATCH_NUMS)), generator=generator)
