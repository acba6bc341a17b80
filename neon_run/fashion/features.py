"""The detector: a small classifier of the training part, whose 64 features measure distances.

The same for every backbone and every training seed, so that their distances compare with one another; they are not FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_files.atomic import sha256_file
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.progress import progress_bar
from neon_metrics.detector import FunctionDetector
from neon_run.fashion.data import NUM_CLASSES

NUM_FEATURES = 64
STEPS, BATCH = 1500, 128
LEAST_ACCURACY = 0.8  # of the held-out images


class FashionFeatures(nn.Module):
    """uint8 [B, 1 or 3, 16, 16] -> {"features": [B, 64], "logits": [B, 10]}, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 4, NUM_FEATURES)
        self.logits = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float().mean(1, keepdim=True) / 127.5 - 1  # equal channels are one
        for conv in (self.conv0, self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)  # 8, 4, 2 pixels a side
        features = F.silu(self.features(x.flatten(1)))
        return {"features": features, "logits": self.logits(features)}


def train_features(images: Tensor, labels: Tensor, *, steps: int = STEPS, seed: int = 0) -> FashionFeatures:
    """A classifier of uint8 `images` [N, 1, 16, 16], frozen and in eval mode: a function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FashionFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in progress_bar(range(steps), desc="detector"):
        picked = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(images[picked])["logits"], labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: FashionFeatures, images: Tensor, labels: Tensor) -> float:
    """Share of `images` that the network assigns to their class."""
    return (network(images)["logits"].argmax(1) == labels).float().mean().item()


def read_detector(path: Path, device: torch.device) -> FunctionDetector:
    """From the file that `prepare` wrote; without classes, so that no Inception Score is reported. Raises UserError."""
    network = FashionFeatures()
    load_strict(network, read_checkpoint(path))
    network = network.to(device).eval().requires_grad_(False)
    name = f"classifier of Fashion-MNIST, {NUM_FEATURES} features, weights {sha256_file(path)[:8]}"
    return FunctionDetector(name, NUM_FEATURES, lambda images: network(images.to(device))["features"])
