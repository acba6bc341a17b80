"""A generator as a user has one: a flow-matching MLP on pictures of soft discs, its sampler and its loss.

As a script, `improve` on it under any number of ranks: tests/core/discs.py BASE REFERENCE OUT
"""
# ruff: noqa: E402  (the path comes first, as in every script)

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import torch
from torch import nn

from neon_core.seeds import PerImageRandom
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_metrics import FunctionDetector
from neon_run import improve

SIDE = 8
DETECTOR = FunctionDetector("pixels", SIDE**2, lambda images: images.flatten(1).float() / 255)
QUICK = {"num_synthetic": 256, "images": 256, "ranking_images": 128, "batch_size": 64, "micro_batch_size": 16}


def discs(count: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [n, 1, 8, 8]: one disc each, of random place, radius and brightness. There is no end of them, so that a
    network cannot learn them by heart, and any number can be held out."""
    place = 1.5 + 4 * torch.rand(count, 2, 1, 1, generator=generator)
    radius, brightness = torch.rand(2, count, 1, 1, generator=generator)
    y = torch.arange(SIDE).float()
    distance = ((y[:, None] - place[:, 0]).square() + (y - place[:, 1]).square()).sqrt()
    shade = (0.4 + 0.6 * brightness) * torch.sigmoid(3 * (1 + 1.5 * radius - distance))
    return (255 * shade).round().to(torch.uint8)[:, None]


class Flow(nn.Module):
    """x [B, 1, 8, 8], time [B] in 0 (noise) to 1 (data) -> velocity like x."""

    def __init__(self, width: int = 128):
        super().__init__()
        layers = nn.Linear(SIDE**2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.net = nn.Sequential(*layers, nn.Linear(width, SIDE**2))

    def forward(self, x, time):
        angles = time[:, None] * torch.arange(1, 9) * (torch.pi / 2)
        return self.net(torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)).view_as(x)


def loss(net, images, labels, generator):
    x = images.float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=generator)
    time = torch.rand(len(x), generator=generator)
    t = time[:, None, None, None]
    return (net((1 - t) * noise + t * x, time) - (x - noise)).square().mean()


def sample(net, seeds, labels, steps=10):
    x = PerImageRandom(seeds).randn(1, SIDE, SIDE)
    for k in range(steps):
        x = x + net(x, torch.full([len(x)], k / steps)) / steps
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def trained(seed: int, steps: int) -> Flow:
    """On `steps` batches of 256 new discs; the learning rate falls to 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net, generator = Flow(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.005, steps)
    for _ in range(steps):
        value = loss(net, discs(256, generator), None, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return net


if __name__ == "__main__":
    torch.set_num_threads(1)
    network = Flow()
    load_strict(network, read_checkpoint(sys.argv[1]))
    improve(network, sample=sample, loss=loss, real=sys.argv[2], detector=DETECTOR, out=sys.argv[3], **QUICK)
