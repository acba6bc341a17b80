"""Weights held in half precision for a sampling call give what autocast gives, bit for bit, which converts them at each
use."""

from contextlib import nullcontext

import pytest
import torch
from imm.tiny import LATENT, PIXEL, randomised
from var.tiny import tiny_vae, tiny_var
from xar.pico import pico_net

from neon_core.seeds import PerImageRandom
from neon_imm.precond import IMMPrecond
from neon_imm.sampler import pushforward, restart, time_grid
from neon_var.sampler import PerImageNoise, sample_tokens
from neon_xar.sampler import sample_latents

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def var(**changes) -> torch.Tensor:
    noise = PerImageNoise(PerImageRandom(range(3)))
    with AUTOCAST:
        return sample_tokens(tiny_var(**changes), tiny_vae(), torch.arange(3), noise, top_k=9, top_p=0.9)[1]


def xar() -> torch.Tensor:
    with AUTOCAST:
        return sample_latents(pico_net(), torch.arange(3), 3, 2.0, PerImageRandom(range(3)).randn)


def imm(config: dict, labels: torch.Tensor | None, cfg: float | None) -> torch.Tensor:
    net = randomised(IMMPrecond(**config))
    noise, *more = torch.randn(3, 3, net.img_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = time_grid(net.schedule, "uniform", 3)
    with net.running(training=False, mixed_precision="bf16"):
        return torch.cat([pushforward(net, noise, grid, labels, cfg), restart(net, noise, grid, more, labels, cfg)])


@pytest.mark.parametrize(
    ("module", "sample"),
    [
        ("neon_var.sampler", var),
        ("neon_var.sampler", lambda: var(shared_aln=True, attn_l2_norm=False)),
        ("neon_xar.sampler", xar),
        ("neon_imm.precond", lambda: imm(LATENT, torch.eye(10)[:3], 1.5)),
        ("neon_imm.precond", lambda: imm(PIXEL, None, None)),
    ],
    ids=["var", "var, shared", "xar", "imm, transformer", "imm, U-Net"],
)
def test_samples_are_those_of_autocast(module, sample, monkeypatch):
    held = sample()
    monkeypatch.setattr(f"{module}.weights_as", lambda *_: nullcontext())
    assert torch.equal(sample(), held)
