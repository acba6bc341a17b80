"""What `neon check` knows of xAR: the published networks without their files, and tiny ones with recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neon_core.kl_vae import AutoencoderKL
from neon_run.check.numbers import Draws, fill, gradient_norms
from neon_run.check.parts import CheckParts, Make, Outputs
from neon_run.row import Row
from neon_xar.backbone import XARBackbone, compile_xar
from neon_xar.loss import Randomness, velocity_loss
from neon_xar.sampler import sample_latents
from neon_xar.vae import SCALE
from neon_xar.xar import CELLS, GRID, XAR, build

TINY_AUTOENCODER: dict[str, Any] = {
    "embed_dim": 4, "ch": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (), "norm_groups": 4,
}  # fmt: skip
TINY: dict[str, Any] = {
    "img_size": 2 * GRID, "vae_stride": 2, "vae_embed_dim": 4, "class_num": 10,
    **{f"{part}_{name}": value for part in ("encoder", "decoder")
       for name, value in {"embed_dim": 32, "depth": 1, "num_heads": 2}.items()},
}  # fmt: skip


def untrained(row: Row, device: torch.device, make: Make) -> XARBackbone | None:
    if row.prepare is not None:
        return None
    net = make(build, row.load["model"], attn_dropout=0.1, proj_dropout=0.1)
    return XARBackbone(net.eval().requires_grad_(False), make(AutoencoderKL))


def tiny(device: torch.device) -> Outputs:
    """Latents of three steps with guidance, their image, and the loss's gradient."""
    net, autoencoder = fill(XAR(**TINY)).eval().to(device), fill(AutoencoderKL(**TINY_AUTOENCODER)).eval().to(device)
    draw, labels = Draws(2, device), torch.tensor([3, 7], device=device)
    with torch.no_grad():
        latents = sample_latents(net, labels, 3, 2.0, draw)
        image = autoencoder.decode(latents / SCALE)
    times = torch.linspace(0.1, 0.9, 2 * CELLS).view(CELLS, 2).to(device)
    noise = torch.stack([draw(net.cell_tokens, net.channels) for _ in range(CELLS)])
    random = Randomness(torch.ones(2, device=device), times, noise)
    loss = velocity_loss(net, draw(net.channels, GRID, GRID), labels, random, 0.0)
    return {"latents": latents, "image": image, "gradient": gradient_norms(loss, net)}


PARTS = CheckParts(
    untrained=untrained,
    compile=lambda backbone: compile_xar(backbone.net, backbone.net.mask.device),
    tiny=tiny,
    recorded=Path(__file__).with_suffix(".json"),
)
