"""Feature networks for the metrics: their interface, the official Inception, and a wrapper for any other function.

A detector maps uint8 images [B, C, H, W] to {"features": [B, D], "logits": [B, K] (only where it has classes)}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from neon_core.precision import float32_precision
from neon_files.atomic import sha256_file
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.errors import UserError
from neon_files.home import download_command, home
from neon_metrics.inception import NUM_CLASSES, NUM_FEATURES, InceptionV3, folded, normalise, resize_tf1

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Detector(Protocol):
    """The interface of a feature network to the accumulators."""

    @property
    def name(self) -> str:
        """Statistics of detectors with different names are never mixed."""
        ...

    @property
    def num_features(self) -> int:
        """D."""
        ...

    @property
    def num_classes(self) -> int:
        """K; 0: no logits, hence no Inception Score."""
        ...

    @property
    def official(self) -> bool:
        """True only for the published Inception weights: other distances are no FIDs to compare."""
        ...

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, C, H, W], any device -> {"features": [B, D], "logits": [B, K] if K > 0}, float, same order."""
        ...


@dataclasses.dataclass(frozen=True)
class FunctionDetector:
    """A detector out of any function: uint8 [B, C, H, W] -> features [B, D], or a pair (features, logits [B, K])."""

    name: str
    num_features: int
    function: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    num_classes: int = 0
    official: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        result = self.function(images)
        outputs = (result,) if isinstance(result, Tensor) else result
        names = ("features", "logits") if self.num_classes else ("features",)
        return dict(zip(names, outputs, strict=True))


class InceptionDetector:
    """Inception v3 behind the TF1 resize: features are the 2048 pooled activations, logits the biasless 1008.

    The network runs in float32, batch norm folded and channels last, in chunks of `chunk_images`. `allow_tf32` gives up
    digits for speed on GPUs, as cuDNN does by default. With `official` False, distances are not comparable to any
    published FID, and `name` identifies the weights.
    """

    num_features = NUM_FEATURES
    num_classes = NUM_CLASSES

    def __init__(
        self,
        net: InceptionV3,
        name: str,
        *,
        official: bool,
        device: torch.device | str = "cpu",
        chunk_images: int = 32,
        allow_tf32: bool = False,
    ):
        self.name = name
        self.official = official
        self.device = torch.device(device)
        self.chunk_images = chunk_images
        self.allow_tf32 = allow_tf32
        self._net = folded(net).to(self.device)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] of any size (or one grey channel) -> {"features", "logits"} float32, on `device`."""
        outputs = self.extract(images, ("2048", "logits_unbiased"))
        return {"features": outputs["2048"], "logits": outputs["logits_unbiased"]}

    @torch.no_grad()
    def extract(self, images: Tensor, features: tuple[str, ...]) -> dict[str, Tensor]:
        """The named features (`inception.FEATURES`) of uint8 images, one pass: {name: float32 [B, D]}."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [B, 3, H, W]; got {images.dtype} {tuple(images.shape)}")
        autocast_off = torch.autocast(self.device.type, enabled=False)  # the caller may be sampling in half precision
        with float32_precision("all" if self.allow_tf32 else "none"), autocast_off:
            chunks = [self._net(self._prepare(chunk), features) for chunk in images.split(self.chunk_images)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in features}

    def _prepare(self, images: Tensor) -> Tensor:
        x = normalise(resize_tf1(images.to(self.device)))
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------- the weight file


def default_weight_paths() -> list[Path]:
    """Where the published weights are looked for, in this order."""
    folders = [
        home() / "checkpoints",
        Path("checkpoints"),
        Path(torch.hub.get_dir()) / "checkpoints",
    ]
    return list(dict.fromkeys((folder / WEIGHTS_NAME).resolve() for folder in folders))


def find_inception_weights() -> Path:
    """The published weight file, its sha256 verified. UserError with the command that fetches it."""
    places = default_weight_paths()
    for path in places:
        if path.is_file():
            digest = sha256_file(path)
            if digest != WEIGHTS_SHA256:
                raise UserError(
                    f"{path}: sha256 is {digest}, not {WEIGHTS_SHA256}, so the file is damaged or another one; "
                    f"delete it and run `{download_command('inception')}`"
                )
            return path
    looked = " or ".join(str(path) for path in places)
    command = download_command("inception")
    raise UserError(f"the Inception weights are missing (looked for {looked}); fetch them with `{command}`")


def load_inception(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    chunk_images: int = 32,
    allow_tf32: bool = False,
) -> InceptionDetector:
    """The Inception detector with the published weights, or with those of `path` (torch or safetensors).

    A file whose sha256 is the published one gives `official = True`. Any other file given by `path` is accepted where
    names and shapes fit; then `official` is False and `name` carries the start of its digest. No pickle is ever run.
    Raises UserError: missing file, damaged default file, other names or shapes, values that are not finite.
    """
    if path is None:
        path, digest = find_inception_weights(), WEIGHTS_SHA256
    else:
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; the published Inception weights come with `{download_command('inception')}`"
            )
        digest = sha256_file(path)
    official = digest == WEIGHTS_SHA256
    name = "inception-v3-compat" if official else f"inception-v3-compat, unofficial weights {digest[:8]}"
    net = _read_network(path)
    return InceptionDetector(
        net, name, official=official, device=device, chunk_images=chunk_images, allow_tf32=allow_tf32
    )


def _read_network(path: Path) -> InceptionV3:
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):  # without random weights
        net = InceptionV3().eval()
    # Counters of training steps, without effect here, and not in every packaging of these weights.
    counters = {key: torch.tensor(0) for key in net.state_dict() if key.endswith("num_batches_tracked")}
    checkpoint = dataclasses.replace(checkpoint, state={**counters, **checkpoint.state})
    load_strict(net, checkpoint)
    bad = [key for key, value in net.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{path}: not finite: {', '.join(bad[:3])} ({len(bad)} tensors); fetch the file again")
    return net
