"""What `neon check` knows of EDM: the published networks without their files, and tiny ones with recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neon_edm import fashion
from neon_edm.backbone import EDMBackbone, augmentation, compile_edm
from neon_edm.loss import loss_map
from neon_edm.precond import build_network
from neon_edm.quickstart import backbone as digits
from neon_edm.sampler import edm_sampler
from neon_run.check.numbers import Draws, fill, gradient_norms
from neon_run.check.parts import CheckParts, Make, Outputs
from neon_run.row import Row

# What the published pickles say about themselves (Karras et al. 2022, table 7, DDPM++).
DDPMPP: dict[str, Any] = {
    "img_channels": 3, "model_type": "SongUNet", "embedding_type": "positional", "encoder_type": "standard",
    "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1], "model_channels": 128,
    "augment_dim": 9,
}  # fmt: skip
PUBLISHED = {
    "cifar10_cond": DDPMPP | {"img_resolution": 32, "label_dim": 10, "channel_mult": [2, 2, 2], "dropout": 0.13},
    "cifar10_uncond": DDPMPP | {"img_resolution": 32, "label_dim": 0, "channel_mult": [2, 2, 2], "dropout": 0.13},
    "ffhq64": DDPMPP | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
}
SMALL = {"digits": digits.NETWORK, "digits_guided": digits.NETWORK, "fashion": fashion.NETWORK}
TINY = DDPMPP | {
    "img_resolution": 8, "label_dim": 3, "model_channels": 32, "channel_mult": [1, 1], "num_blocks": 1,
    "attn_resolutions": [4],
}  # fmt: skip


def untrained(row: Row, device: torch.device, make: Make) -> EDMBackbone:
    config = {"class": "EDMPrecond", "kwargs": {**PUBLISHED, **SMALL}[row.name]}
    net = make(build_network, config["class"], config["kwargs"], memory_format=torch.channels_last)
    augment = row.load_training.get("augment", 0)
    options = {"augment": augmentation(augment)} if augment else {}
    backbone: Any = row.backbone  # EDMBackbone or one derived from it
    return backbone(net, config, device, **options)


def tiny(device: torch.device) -> Outputs:
    """Images of four steps with churn, and the loss's gradient."""
    net = fill(build_network("EDMPrecond", TINY)).eval().to(device)
    draw, labels = Draws(2, device), torch.eye(3, device=device)[:2]
    shape = (3, 8, 8)
    with torch.no_grad():
        latents, noise = draw(*shape), lambda: draw(*shape, dtype=torch.float64)
        images = edm_sampler(net, latents, labels, noise, num_steps=4, S_churn=2.0)
    sigma = torch.tensor([0.5, 2.0], device=device)[:, None, None, None]
    loss = loss_map(net, draw(*shape), sigma, torch.ones_like(sigma), draw(*shape), labels).sum()
    return {"images": images, "gradient": gradient_norms(loss, net)}


PARTS = CheckParts(
    untrained=untrained,
    compile=lambda backbone: compile_edm(backbone.net, backbone.device),
    tiny=tiny,
    recorded=Path(__file__).with_suffix(".json"),
)
