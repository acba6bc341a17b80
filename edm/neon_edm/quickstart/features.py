"""The detector: a small digit classifier, trained in the run on the training part, whose features measure distances.

Distances in its features compare only within one run; they are not FID.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_edm.quickstart.digits import NUM_CLASSES, to_unit_range
from neon_files.atomic import sha256_file
from neon_files.checkpoint import load_strict, read_checkpoint

NUM_FEATURES = 32


class FeatureNetwork(nn.Module):
    """uint8 [B, 1, 8, 8] -> {"features": [B, 32], "logits": [B, 10]}, float32."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.features = nn.Linear(128, NUM_FEATURES)
        self.logits = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.from_unit(to_unit_range(images))

    def from_unit(self, x: Tensor) -> dict[str, Tensor]:
        """The same for x in [-1, 1]."""
        x = F.silu(self.conv0(x))  # [B, 16, 8, 8]
        x = F.avg_pool2d(F.silu(self.conv1(x)), 2)  # [B, 32, 4, 4]
        x = F.avg_pool2d(F.silu(self.conv2(x)), 2)  # [B, 32, 2, 2]
        features = F.silu(self.features(x.flatten(1)))
        return {"features": features, "logits": self.logits(features)}


def train_features(
    images: Tensor, labels: Tensor, *, seed: int, num_steps: int = 600, on_step: Callable[[], None] = lambda: None
) -> FeatureNetwork:
    """A classifier of uint8 `images` [N, 1, 8, 8], frozen and in eval mode: a function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    x_all = to_unit_range(images)
    for _ in range(num_steps):
        picked = torch.randint(len(labels), (128,), generator=generator)
        x = x_all[picked] + 0.1 * torch.randn(128, 1, 8, 8, generator=generator)
        loss = F.cross_entropy(network.from_unit(x)["logits"], labels[picked], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        on_step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Tensor, labels: Tensor) -> float:
    """Share of `images` that the network assigns to their class."""
    return (network(images)["logits"].argmax(1) == labels).float().mean().item()


class DigitsDetector:
    """The trained network as the detector of `neon_metrics`: 32 features, 10 logits."""

    num_features = NUM_FEATURES
    num_classes = NUM_CLASSES
    official = False

    def __init__(self, network: FeatureNetwork, name: str, device: torch.device | str = "cpu"):
        self.network, self.name, self.device = network.to(device), name, torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 1, 8, 8] -> {"features": [B, 32], "logits": [B, 10]}, float32."""
        return self.network(images.to(self.device))


def read_detector(path: Path, device: torch.device) -> DigitsDetector:
    """From the file that `prepare` wrote. Raises UserError."""
    network = FeatureNetwork()
    load_strict(network, read_checkpoint(path))
    name = f"classifier of digits, {NUM_FEATURES} features, weights {sha256_file(path)[:8]}"
    return DigitsDetector(network.eval().requires_grad_(False), name, device)
