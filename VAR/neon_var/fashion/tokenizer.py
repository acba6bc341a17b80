"""The frozen tokenizer of the Fashion-MNIST rows: the product's VQVAE for 16 x 16 grey images, 1 + 4 + 16 tokens.

Trained from the reconstruction of pixels, van den Oord et al. 2017 (arXiv 1711.00937), over the residual scales of
Tian et al. 2024, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_files.progress import progress_bar
from neon_var.preprocessing import to_unit_range
from neon_var.vqvae import VQVAE

PATCH_NUMS = (1, 2, 4)
VAE_KWARGS: dict[str, Any] = {
    "vocab_size": 256,
    "z_channels": 16,
    "ch": 32,
    "ch_mult": (1, 1, 1),
    "num_res_blocks": 1,
    "in_channels": 1,
    "share_quant_resi": 1,
    "v_patch_nums": PATCH_NUMS,
}
BATCH = 32
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
COMMITMENT = 0.25
RESTART_STEPS = 50  # codes that no token named for so many steps are placed anew


def train_tokenizer(images: Tensor, *, seed: int, num_steps: int) -> VQVAE:
    """A VQVAE of uint8 `images` [N, 1, 16, 16], frozen and in eval mode: a function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VQVAE(**VAE_KWARGS, test_mode=False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    used = torch.zeros(len(vae.codes), dtype=torch.bool)  # all are placed anew in the first step
    for step in progress_bar(range(num_steps), desc="tokenizer"):
        factor = min((step + 1) / WARMUP_STEPS, 1) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        x = to_unit_range(images[torch.randint(len(images), (BATCH,), generator=generator)])
        f = vae.features(x)
        if step % RESTART_STEPS == 0 and step < num_steps // 2:
            place_unused(vae, f.detach(), used, generator)
            used.zero_()
        scales = list(vae.quantize.scales(f))
        used[torch.cat([tokens.flatten() for tokens, _ in scales])] = True
        loss = vq_loss(vae, x, f, [f_hat for _, f_hat in scales])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    return vae.eval().requires_grad_(False)


def vq_loss(vae: VQVAE, x: Tensor, f: Tensor, f_hats: Sequence[Tensor]) -> Tensor:
    """Squared error of the pixels, the decoder reading f_hat and its gradient going on to f; f_hat of every scale
    moves towards f, and f a little towards it."""
    quantized = f + (f_hats[-1] - f).detach()
    loss = F.mse_loss(vae.decoder(vae.post_quant_conv(quantized)), x)
    for f_hat in f_hats:
        codes, commitment = F.mse_loss(f_hat, f.detach()), F.mse_loss(f, f_hat.detach())
        loss = loss + (codes + COMMITMENT * commitment) / len(f_hats)
    return loss


@torch.no_grad()
def place_unused(vae: VQVAE, f: Tensor, used: Tensor, generator: torch.Generator) -> None:
    """Put the codes that are not `used` [V] on vectors that the scales have to quantize, drawn from the features f
    [B, C, P, P]: a code without tokens has no gradient and would stay unused."""
    f_hat, vectors = torch.zeros_like(f), []
    for p, (_, following) in zip(vae.patch_nums, vae.quantize.scales(f), strict=True):
        vectors.append(F.adaptive_avg_pool2d(f - f_hat, p).permute(0, 2, 3, 1).reshape(-1, f.shape[1]))
        f_hat = following
    candidates = torch.cat(vectors)  # [B L, C]
    picked = torch.randint(len(candidates), (int((~used).sum()),), generator=generator)
    vae.codes[~used] = candidates[picked]
