"""A whole xAR of a few thousand weights: 16x16 latents of 4 channels, autoencoder of stride 2, 32 px, ten classes."""

from pathlib import Path

import torch

from neon_core.kl_vae import AutoencoderKL
from neon_files.checkpoint import write_checkpoint
from neon_xar.xar import XAR

VAE = {"embed_dim": 4, "ch": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (), "norm_groups": 4}
NET = {
    "img_size": 32,
    "vae_stride": 2,
    "vae_embed_dim": 4,
    "class_num": 10,
    **{f"{part}_embed_dim": 16 for part in ("encoder", "decoder")},
    **{f"{part}_depth": 1 for part in ("encoder", "decoder")},
    **{f"{part}_num_heads": 2 for part in ("encoder", "decoder")},
    "attn_dropout": 0.1,
    "proj_dropout": 0.1,
}


def pico_vae(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**VAE).eval()


def pico_net(seed: int = 0, grid: int = 16) -> XAR:
    """With another grid, images of 2 x 2 pixels per position, so that its 4 channels can be these pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return XAR(**{**NET, "img_size": 2 * grid, "grid": grid}).eval()


def write_pico(folder: Path) -> tuple[Path, Path]:
    """(checkpoint, autoencoder), files that say themselves what they are."""
    net, vae = pico_net(), pico_vae()
    write_checkpoint(folder / "base.pth", net.state_dict(), {"class": "XAR", "kwargs": net.config})
    write_checkpoint(folder / "vae.ckpt", vae.state_dict(), {"class": "AutoencoderKL", "kwargs": vae.config})
    return folder / "base.pth", folder / "vae.ckpt"
