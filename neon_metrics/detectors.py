"""Detectors by name: the published Inception, DINOv2 as FD-DINOv2 measures it, any network of timm, a weight file.

timm is the extra `detectors`, and imported only where one of its networks is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neon_core.precision import float32_precision
from neon_files.errors import UserError, one_line
from neon_metrics.detector import Detector, load_inception

INCEPTION, DINOV2, TIMM = "inception", "dinov2", "timm:"
DINOV2_NETWORK = "vit_large_patch14_dinov2.lvd142m"  # timm's name of DINOv2 ViT-L/14
DINOV2_SIDE, DINOV2_GRID = 224, 16  # pixels, patches
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, of values in [0, 1]


def is_detector_name(name: object) -> bool:
    """Whether it is the name of a network, not a file of Inception weights."""
    return isinstance(name, str | Path) and (str(name) in (INCEPTION, DINOV2) or str(name).startswith(TIMM))


def open_detector(name: Detector | str | Path | None, device: torch.device | str = "cpu") -> Detector:
    """None or "inception", "dinov2", "timm:NAME", a file of Inception weights, or a detector, which is returned.

    Raises UserError: unknown names, weights that are not here and cannot be fetched.
    """
    if name is not None and not isinstance(name, str | Path):
        return name
    text = str(name)
    if name is None or text == INCEPTION:
        return load_inception(None, device)
    if text == DINOV2:
        return DinoV2Detector(_timm_network(text, DINOV2_NETWORK), f"dinov2 ({DINOV2_NETWORK})", device)
    if text.startswith(TIMM):
        net = _timm_network(text, text.removeprefix(TIMM))
        config = net.pretrained_cfg
        side = config.get("test_input_size", config["input_size"])[-1]
        return NetworkDetector(net, text, device, side=side, mean=config["mean"], deviation=config["std"])
    return load_inception(name, device)


def _timm_network(asked: str, name: str) -> Any:
    """The pretrained network without its classifier. Raises UserError."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--detector {asked}: needs the package timm; install it with `pip install 'neon-reference[detectors]'`"
        ) from error
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of many kinds: unknown name, no network, damaged cache
        raise UserError(
            f"--detector {asked}: {name} cannot be loaded ({one_line(error)}); timm fetches the weights of a name that "
            "`timm.list_models(pretrained=True)` lists once, where there is network"
        ) from error


class NetworkDetector:
    """Any network from [B, 3, side, side] to features [B, D].

    Images become float, `side` pixels a side (bicubic with antialias, whatever their form), and are divided by 255,
    then brought to `mean` and `deviation` of the network. It runs in float32, in chunks of `chunk_images`.
    """

    official = False  # of Inception only
    num_classes = 0  # its classes are not those of the Inception Score

    def __init__(
        self,
        net: nn.Module,
        name: str,
        device: torch.device | str = "cpu",
        *,
        side: int,
        mean: Sequence[float] = IMAGENET[0],
        deviation: Sequence[float] = IMAGENET[1],
        chunk_images: int = 32,
    ):
        self.name, self.side, self.chunk_images = name, side, chunk_images
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self._mean, self._deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (mean, deviation))
        self.num_features = self(torch.zeros(1, 3, side, side, dtype=torch.uint8))["features"].shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3 or 1, H, W] -> {"features": float32 [B, D]}, on `device`."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [B, 3, H, W]; got {images.dtype} {tuple(images.shape)}")
        with float32_precision("none"), torch.autocast(self.device.type, enabled=False):
            chunks = [self.features(self.prepared(chunk)) for chunk in images.split(self.chunk_images)]
        return {"features": torch.cat(chunks).float()}

    def prepared(self, images: Tensor) -> Tensor:
        """float32 [B, 3, side, side]. As the originals do, nothing is clamped where bicubic weights overshoot."""
        x = images.to(self.device, torch.float32)
        x = functional.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)
        return ((x / 255).expand(-1, 3, -1, -1) - self._mean) / self._deviation

    def features(self, x: Tensor) -> Tensor:
        features = self.net(x)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise UserError(f"--detector {self.name}: gives no feature vector per image; choose a classifier of timm")
        return features


class DinoV2Detector(NetworkDetector):
    """A vision transformer of timm in the form of FD-DINOv2 (Stein et al. 2023; EDM2): at 224 pixels, the class token
    behind the last norm.

    timm would bring the table of positions to the smaller grid with antialias; the published statistics are of the
    original's, without.
    """

    def __init__(self, net: Any, name: str, device: torch.device | str = "cpu", **options: Any):
        table = dinov2_positions(net.pos_embed.detach(), DINOV2_GRID)
        net.set_input_size(img_size=DINOV2_SIDE)
        with torch.no_grad():
            net.pos_embed.copy_(table)
        super().__init__(net, name, device, side=DINOV2_SIDE, **options)

    def features(self, x: Tensor) -> Tensor:
        network: Any = self.net  # of timm
        return network.forward_features(x)[:, 0]


def dinov2_positions(table: Tensor, grid: int) -> Tensor:
    """[1, 1 + n^2, D] (class token first) -> [1, 1 + grid^2, D]: bicubic without antialias, by the scale factor
    (grid + 0.1) / n, the 0.1 being the original's guard against rounding, which shifts the places looked up."""
    side = round((table.shape[1] - 1) ** 0.5)
    places = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    places = functional.interpolate(places, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert places.shape[-2:] == (grid, grid), f"{tuple(places.shape)}: the table has {side} x {side} places"
    return torch.cat([table[:, :1].float(), places.flatten(2).transpose(1, 2)], 1).to(table.dtype)
