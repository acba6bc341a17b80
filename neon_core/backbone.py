"""The contract between the method and a generator: the interface of a backbone, and its training settings.

The core owns seeds, ranks, files, the training loop, the merge and the metrics. A backbone owns its networks, guidance,
label conventions, frozen tokenizer and pixel rounding. `docs/adding_a_backbone.md` walks through a fifth one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from neon_core.data_order import shuffled_epochs
from neon_core.schedules import Constant, Ema, Schedule
from neon_files.image_set import ImageSet


@dataclass(frozen=True)
class TrainSettings:
    """The short fine-tune on the synthetic set. Lengths are counted in images seen, never in steps or epochs."""

    images: int  # length of the fine-tune
    batch_size: int  # images per optimizer step, over all ranks
    micro_batch_size: int  # images per forward pass; fixes the random numbers, so that ranks do not
    lr: float  # peak; `schedule` scales it
    schedule: Schedule = field(default_factory=Constant)  # images seen before the step -> factor of lr
    optimizer: str = "adam"  # adam | adamw | radam
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None  # total L2 norm of the gradient
    nonfinite_gradients: str = "raise"  # raise | zero (NaN -> 0, +-inf -> +-1e5, as EDM) | step (as they are)
    ema: Ema | None = None  # None: the raw weights are theta_syn
    precision: str = "fp32"  # fp32 | fp16 (with a gradient scaler) | bf16
    scaler_init: float = 2.0**16
    scaler_growth_interval: int = 2000
    scaler_max: float | None = None
    snapshot_images: int | tuple[int, ...] = 250_000  # a snapshot at every multiple or at these counts, and at the end


class Backbone(Protocol):
    """A generator that Neon can improve. Subclass it explicitly to inherit the defaults of the last methods."""

    net: nn.Module  # the only weights Neon trains and merges; keys as in the published checkpoint
    img_size: int  # output side, pixels
    num_classes: int  # 0: unconditional
    prepared_key: str = ""  # not "": the output of `prepare` is kept on disk beside the set under this name, which must
    # change with the tokenizer and its weights
    micro_batch_multiple: int = 1  # the loss takes micro batches of a multiple of this
    unused_parameters: bool = False  # True: a loss may leave parameters of `net` out, which ranks must then search for

    @classmethod
    def load(cls, checkpoint: str | Path, device: torch.device, **options: Any) -> Backbone:
        """The backbone with the weights of `checkpoint`, in eval mode on `device`. Raises UserError.

        `options` are the backbone's: properties of its network that a file does not record, and files of frozen parts;
        `entry` (optional) names the state dict to take where a file holds several.
        """
        ...

    def assign_labels(self, seeds: Sequence[int], **settings: Any) -> Tensor | None:
        """int64 [N] on the CPU, one class for each image of the whole run, or None if unconditional.

        A pure function of (seeds, settings): every rank calls it with the whole list.
        """
        ...

    def sample(self, seeds: Sequence[int], labels: Tensor | None, **settings: Any) -> Tensor:
        """Images for `seeds` [B] and `labels` [B] (or None): uint8 [B, C, img_size, img_size] on the device.

        An image is a function of (weights, settings, its seed, its label): each draws from its own generator. Raises
        NotFiniteImages (`pixels.check_finite`, before the cast) where the network gives NaN or infinity.
        """
        ...

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Scalar, the mean over the micro batch `x`, an output of `encode`; all randomness from `generator`
        (dropout masks aside, which come from the seeded default generator)."""
        ...

    def network_config(self) -> dict[str, Any]:
        """JSON: {"class": name, "kwargs": constructor arguments}. Stored in the checkpoints that we write."""
        ...

    # Defaults that most backbones keep. Without `return` an empty body is abstract to type checkers.

    @classmethod
    def frozen_files(cls, checkpoint: Path, **options: Any) -> dict[str, Path]:
        """Option of `load` -> file of a frozen part (a tokenizer) that the network of `checkpoint` needs; it may be
        missing, as may `checkpoint`."""
        return {}

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """UserError for sampler settings that no network of this kind can use. Called before anything is loaded."""
        return

    def check_network(self, **settings: Any) -> None:
        """UserError for sampler settings that this network cannot use."""
        return

    def arrays(self, **settings: Any) -> bool:
        """Whether `sample` gives numbers [B, C, H, W], uint8 or float32, and no pictures: they are kept as .npy."""
        return False

    def precisions(self, **settings: Any) -> dict[str, str]:
        """{"network": a key of PRECISIONS, and "decoder" where there is one}: how `sample` computes with these settings
        on this device, for the records of what it made."""
        return {}

    def check_set(self, images: ImageSet) -> None:
        """UserError where the network cannot be trained on this set: sizes, channels, labels."""
        return

    def file_order(self, labels: Tensor | None) -> np.ndarray | None:
        """int64 [N]: images of a run with `labels` in the order in which the official evaluation reads them, which the
        splits of the Inception Score depend on; None for their own order."""
        return None

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of the synthetic set -> the item kept per image: deterministic, computed once."""
        return images

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """`prepare`'s output [B, ...] -> the input of the loss: crops, flips, posterior samples, from `generator`."""
        return prepared

    def through_tokenizer(self, images: Tensor) -> Tensor | None:
        """uint8 images [B, C, H, W] of S as `prepare` and the frozen tokenizer's decoder give them back, without random
        crops and flips; None where there is no tokenizer. `neon diagnose` measures the drift with it."""
        return None

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups over `net`."""
        return [{"params": [p for p in self.net.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of `net`: units of sharding and of activation checkpointing."""
        return []

    def data_order(self, num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        """Endless global batches: int64 [batch_size], indices into the synthetic set."""
        return shuffled_epochs(num_items, batch_size, seed)
