"""A generator of a few hundred parameters that is none of the four: shows that the core needs nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from neon_core.backbone import Backbone, TrainSettings
from neon_core.schedules import Ema, LinearRamp
from neon_core.seeds import PerImageRandom

NUM_SYNTHETIC = 40
SETTINGS = {"contrast": 1.0}  # of the sampler
TRAIN = TrainSettings(
    images=160,
    batch_size=8,
    micro_batch_size=2,
    lr=1e-2,
    schedule=LinearRamp(40),
    ema=Ema(decay=0.9),
    snapshot_images=80,
)
RECIPE = SimpleNamespace(num_synthetic=NUM_SYNTHETIC, generate=SETTINGS, train=TRAIN, w=1.0, evaluate=SETTINGS)


class PicoNet(nn.Module):
    """noise [B, 8], class [B] -> image [B, 3, 8, 8] in [0, 1]."""

    def __init__(self, num_classes: int = 4, dropout: float = 0.1):
        super().__init__()
        self.kwargs = {"num_classes": num_classes, "dropout": dropout}
        self.label = nn.Embedding(num_classes, 8)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 3 * 8 * 8)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, z, labels):
        h = self.dropout(torch.tanh(self.hidden(z + self.label(labels))))
        return torch.sigmoid(self.out(h)).view(-1, 3, 8, 8)


class PicoBackbone(Backbone):
    """A one-step generator whose loss draws noise and whose encoder flips images at random."""

    img_size = 8

    def __init__(self, net: PicoNet, device="cpu"):
        self.net, self.device = net.to(device), torch.device(device)
        self.num_classes = net.kwargs["num_classes"]

    @classmethod
    def fresh(cls, seed: int = 0, **kwargs) -> PicoBackbone:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(PicoNet(**kwargs).eval())

    def network_config(self):
        return {"class": "PicoNet", "kwargs": self.net.kwargs}

    def blocks(self):
        return [self.net.hidden, self.net.out]

    def assign_labels(self, seeds, **settings):
        return torch.tensor([seed % self.num_classes for seed in seeds])

    @torch.no_grad()
    def sample(self, seeds, labels, contrast=1.0):
        z = PerImageRandom(seeds, self.device).randn(8)
        image = self.net(z, labels.to(self.device))
        return ((image - 0.5) * contrast + 0.5).mul(255).clamp(0, 255).to(torch.uint8)

    def encode(self, prepared, generator):
        x = prepared.float() / 255
        flip = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        return torch.where(flip[:, None, None, None], x.flip(-1), x)

    def self_training_loss(self, x, labels, generator):
        z = torch.randn(len(x), 8, generator=generator, device=x.device)
        return (self.net(z, labels) - x).square().mean()


class PixelMoments:
    """A detector for tests: channel means of quarters as features [B, 12], and logits from them."""

    name = "pixel moments"
    num_features = 12
    num_classes = 12
    official = False

    def __call__(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255
        return {"features": pooled, "logits": pooled * 3}
