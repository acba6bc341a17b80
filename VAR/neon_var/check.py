"""What `neon check` knows of VAR: the published networks without their files, and tiny ones with recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_run.check.numbers import fill, gradient_norms, normal
from neon_run.check.parts import CheckParts, Make, Outputs
from neon_run.row import Row
from neon_var.architectures import ARCHITECTURES, tokenizer
from neon_var.backbone import VARBackbone, compile_var
from neon_var.loss import token_loss
from neon_var.sampler import sample_scales
from neon_var.var import VAR
from neon_var.vqvae import VQVAE

PATCH_NUMS = (1, 2, 3)
TINY: dict[str, Any] = {
    "vocab_size": 64, "Cvae": 8, "num_classes": 10, "depth": 2, "embed_dim": 32, "num_heads": 2,
    "patch_nums": PATCH_NUMS,
}  # fmt: skip
TINY_TOKENIZER: dict[str, Any] = {"vocab_size": 64, "z_channels": 8, "ch": 32, "v_patch_nums": PATCH_NUMS}


def untrained(row: Row, device: torch.device, make: Make) -> VARBackbone | None:
    if row.prepare is not None:
        return None
    architecture = ARCHITECTURES[row.load["architecture"]]
    kwargs = architecture.network()
    net, vae = make(VAR, **kwargs), make(VQVAE, **tokenizer(architecture.patch_nums))
    return VARBackbone(net.eval().requires_grad_(False), vae.eval().requires_grad_(False), kwargs)


class FixedTokens:
    """In the place of noise: the same tokens on every device, whatever the probabilities are; none for soft codes."""

    def draw(self, probabilities: Tensor) -> Tensor:
        numbers = normal(f"tokens {probabilities.shape[1]}", probabilities.shape[:2])
        return torch.from_numpy((numbers * 1000).astype("int64") % 64).to(probabilities.device)


def tiny(device: torch.device) -> Outputs:
    """Logits of the last scale through the cache, the image of fixed tokens, and the loss's gradient."""
    net, vae = fill(VAR(**TINY)).eval().to(device), fill(VQVAE(**TINY_TOKENIZER)).eval().to(device)
    labels = torch.tensor([3, 7], device=device)
    with torch.no_grad():
        tokens_only: Any = FixedTokens()
        scales = list(sample_scales(net, vae.quantize, labels, tokens_only, cfg=2.0, top_k=40, top_p=0.9))
        image = vae.decode(scales[-1].f_hat)
    tokens = [scale.tokens for scale in scales]
    logits = net(labels, vae.quantize.teacher_input(tokens))
    loss = token_loss(logits, torch.cat(tokens, dim=1), net.num_tokens)
    return {"logits": scales[-1].guided_logits, "image": image, "gradient": gradient_norms(loss, net)}


PARTS = CheckParts(
    untrained=untrained,
    compile=lambda backbone: compile_var(backbone.net, backbone.device),
    tiny=tiny,
    recorded=Path(__file__).with_suffix(".json"),
)
