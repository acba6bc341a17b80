"""The contract: load, label, sample, and the loss of the fine-tune."""

from __future__ import annotations

import math

import torch
from torch import nn

from neon_core.backbone import Backbone
from neon_core.seeds import PerImageRandom
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.errors import UserError


class Generator(nn.Module):
    """noise [B, 8], class [B] -> image [B, 3, size, size] in [0, 1]."""

    def __init__(self, num_classes: int = 4, size: int = 8):
        super().__init__()
        self.kwargs = {"num_classes": num_classes, "size": size}
        self.label, self.hidden = nn.Embedding(num_classes, 8), nn.Linear(8, 16)
        self.out = nn.Linear(16, 3 * size * size)

    def forward(self, z, labels):
        h = torch.tanh(self.hidden(z + self.label(labels)))
        return torch.sigmoid(self.out(h)).view(len(z), 3, self.kwargs["size"], -1)


class FifthBackbone(Backbone):
    def __init__(self, net: Generator, device: torch.device):
        self.net, self.device = net.to(device).eval().requires_grad_(False), device
        self.num_classes, self.img_size = net.kwargs["num_classes"], net.kwargs["size"]

    @classmethod
    def load(cls, checkpoint, device, entry=None):
        read = read_checkpoint(checkpoint, entry)
        net = Generator(**(read.config or {"kwargs": {}})["kwargs"])
        load_strict(net, read)
        return cls(net, device)

    @classmethod
    def check_settings(cls, contrast=1.0, **settings):
        if not math.isfinite(contrast):
            raise UserError(f"--contrast {contrast}: a finite number is required")

    def network_config(self):
        return {"class": "Generator", "kwargs": self.net.kwargs}

    def assign_labels(self, seeds, **settings):
        return torch.tensor([seed % self.num_classes for seed in seeds])

    @torch.no_grad()
    def sample(self, seeds, labels, contrast=1.0):
        images = self.net(PerImageRandom(seeds, self.device).randn(8), labels.to(self.device))
        return ((images - 0.5) * contrast + 0.5).mul(255).clamp(0, 255).to(torch.uint8)

    def encode(self, prepared, generator):
        return prepared.float() / 255

    def self_training_loss(self, x, labels, generator):
        z = torch.randn(len(x), 8, generator=generator, device=x.device)
        return (self.net(z, labels) - x).square().mean()
