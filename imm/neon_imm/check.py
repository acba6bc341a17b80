"""What `neon check` knows of IMM: the published networks without their files, and tiny ones with recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neon_core.kl_vae import AutoencoderKL
from neon_imm import fashion
from neon_imm.backbone import IMMBackbone, compile_imm
from neon_imm.latents import Codec, RgbCodec, VaeCodec
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond, build_network
from neon_imm.sampler import pushforward, restart, time_grid
from neon_imm.vae_files import SD_VAE_CONFIG
from neon_run.check.numbers import Draws, fill, gradient_norms
from neon_run.check.parts import CheckParts, Make, Outputs
from neon_run.row import Row

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 3, "num_classes": 3, "model_type": "DiT", "patch_size": 2,
    "hidden_size": 48, "depth": 2, "num_heads": 4, "temb_type": "stride", "f_type": "euler_fm",
}  # fmt: skip
TINY_PIXELS: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "f_type": "simple_edm", "eps": 0.006,
}  # fmt: skip


def untrained(row: Row, device: torch.device, make: Make) -> IMMBackbone:
    kwargs, loss = row.load.get("network", fashion.NETWORK), row.load.get("loss", fashion.LOSS)
    config = {"class": "IMMPrecond", "kwargs": kwargs}
    codec: Codec = RgbCodec(kwargs["img_channels"])
    name = ""
    if row.load.get("latent", True):
        vae = make(AutoencoderKL.from_diffusers_config, SD_VAE_CONFIG, memory_format=torch.channels_last)
        codec, name = VaeCodec(vae.eval().requires_grad_(False)), "sd"
    return IMMBackbone(make(build_network, config), codec, loss, config, name)


def tiny(device: torch.device) -> Outputs:
    """Samples of both samplers and both networks, and the loss's gradient."""
    net = fill(IMMPrecond(**TINY)).eval().to(device)
    unet = fill(IMMPrecond(**TINY_PIXELS)).eval().to(device)
    draw, labels = Draws(4, device), torch.eye(3, device=device)[[0, 1, 2, 0]]
    grid = time_grid(net.schedule, "uniform", 3, device=device)
    noise, *more = (draw(4, 8, 8) * net.sigma_data for _ in range(3))
    pushed, restarted = pushforward(net, noise, grid, labels, 1.5), restart(net, noise, grid, more, labels, 1.5)
    grid = time_grid(unet.schedule, "mid_nt", mid_nt=(1.4,), device=device)
    pixels = pushforward(unet, draw(3, 8, 8) * unet.sigma_data, grid)
    times = {name: torch.tensor([u], dtype=torch.float64, device=device) for name, u in (("u_t", 0.7), ("u_s", 0.4))}
    loss, _ = IMMLoss(sample_t_mode="uniform").from_draws(net, draw(4, 8, 8), labels, noise=draw(4, 8, 8), **times)
    gradient = gradient_norms(loss.mean(), net)
    return {"pushforward": pushed, "restart": restarted, "pixels": pixels, "gradient": gradient}


PARTS = CheckParts(
    untrained=untrained,
    compile=lambda backbone: compile_imm(backbone.net, backbone.device),
    tiny=tiny,
    recorded=Path(__file__).with_suffix(".json"),
)
