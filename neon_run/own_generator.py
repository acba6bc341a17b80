"""A backbone out of a module and two functions, its sampler and its loss, and what is checked of them beforehand."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.pixels import check_finite
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.errors import UserError

SAME = 0.05  # of the difference between two seeds' images: what rounding may change in one image, and not more


@dataclass(frozen=True)
class Parts:
    """What a user gives. `shape` and `dtype` are those of one sample, once they are known (see `examined`)."""

    net: nn.Module
    sample: Callable[[nn.Module, list[int], Tensor | None], Tensor]
    loss: Callable[[nn.Module, Tensor, Tensor | None, torch.Generator], Tensor]
    num_classes: int = 0
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8

    @property
    def pictures(self) -> bool:
        """Whether samples are square images that PNG can hold."""
        return (
            self.dtype == torch.uint8
            and len(self.shape) == 3
            and self.shape[0] in (1, 3)
            and self.shape[1] == self.shape[2]
        )

    def sampled(self, net: nn.Module, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """What `sample` gives: uint8, or any floats as float32, [B, ...], finite. Raises UserError."""
        with torch.no_grad():
            images = self.sample(net, list(seeds), labels)
        if not isinstance(images, Tensor):
            raise UserError(f"sample: gives a {type(images).__name__}; a tensor of uint8 or of floats is wanted")
        if images.ndim < 2 or len(images) != len(seeds):
            raise UserError(
                f"sample: gives {list(images.shape)} for {len(seeds)} seeds; the first dimension must count them"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"sample: gives {images.dtype}; uint8 (images of 0 to 255) or floats are wanted")
        images = images.detach() if images.dtype == torch.uint8 else check_finite(images.detach().float())
        if self.shape and (tuple(images.shape[1:]), images.dtype) != (self.shape, self.dtype):
            raise UserError(
                f"sample: gives {images.dtype} {list(images.shape[1:])} per image, and gave {self.dtype} "
                f"{list(self.shape)} before; all samples must be of one kind"
            )
        return images


class OwnGenerator(Backbone):
    """The backbone of `parts`, which a subclass holds (see `backbone_of`)."""

    parts: ClassVar[Parts]
    unused_parameters = True  # nothing is known of the loss

    def __init__(self, net: nn.Module, device: torch.device):
        self.trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        self.net, self.device = net.to(device).eval().requires_grad_(False), device
        self.num_classes = self.parts.num_classes
        self.img_size = self.parts.shape[-1]

    @classmethod
    def load(cls, checkpoint: str | Path, device: torch.device, **options: Any) -> OwnGenerator:
        net = copy.deepcopy(cls.parts.net)
        load_strict(net, read_checkpoint(checkpoint))
        return cls(net, device)

    def arrays(self, **settings: Any) -> bool:
        return not self.parts.pictures

    def network_config(self) -> dict[str, Any]:
        return {"class": type(self.net).__name__, "kwargs": {}}

    def assign_labels(self, seeds: Sequence[int], **settings: Any) -> Tensor | None:
        return classes_of(seeds, self.num_classes)

    def sample(self, seeds: Sequence[int], labels: Tensor | None, **settings: Any) -> Tensor:
        images = self.parts.sampled(self.net, seeds, None if labels is None else labels.to(self.device))
        return images.reshape(len(images), 1, 1, -1) if self.arrays() else images

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        return prepared.reshape(len(prepared), *self.parts.shape)

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.parts.loss(self.net, x, labels, generator)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What the user had frozen stays so."""
        own = dict(self.net.named_parameters())
        return [{"params": [own[name] for name in self.trained], "weight_decay": weight_decay}]


def backbone_of(parts: Parts) -> type[OwnGenerator]:
    """The class whose `load` gives copies of the module with other weights."""
    return type("OwnGenerator", (OwnGenerator,), {"parts": parts})


def classes_of(seeds: Sequence[int], num_classes: int) -> Tensor | None:
    """int64 [B]: one class after the other; None without classes."""
    return torch.tensor([seed % num_classes for seed in seeds]) if num_classes else None


def examined(parts: Parts, device: torch.device) -> Parts:
    """`parts` with shape and dtype of a sample. UserError, in one sentence, for what cannot be improved: no trainable
    parameters, a sampler that is no function of each image's seed, a loss that is no finite scalar of the network."""
    if not any(parameter.requires_grad for parameter in parts.net.parameters()):
        raise UserError("net: has no trainable parameters; set requires_grad of those that may move")
    net = copy.deepcopy(parts.net).to(device).eval()

    def sample(*seeds: int) -> Tensor:
        labels = classes_of(seeds, parts.num_classes)
        return parts.sampled(net, seeds, None if labels is None else labels.to(device))

    first, again, others = sample(0, 1, 2, 3), sample(0, 1, 2, 3), sample(9, 2, 11, 0)
    apart = _difference(first, first.roll(1, 0))
    if _difference(first, again) > SAME * apart:
        raise UserError(
            "sample: two calls with the same seeds give different images; draw all randomness of an image from a "
            "generator of its own seed (neon_core.seeds.PerImageRandom does)"
        )
    if _difference(first[[2, 0]], others[[1, 3]]) > SAME * apart:
        raise UserError(
            "sample: the image of a seed changes with the other seeds of its batch; draw each image's randomness from "
            "a generator of its own seed (neon_core.seeds.PerImageRandom does)"
        )
    labels = classes_of(range(4), parts.num_classes)
    generator = torch.Generator(device).manual_seed(0)
    value = parts.loss(net.train(), first, None if labels is None else labels.to(device), generator)
    if not isinstance(value, Tensor) or value.ndim:
        shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"loss: gives {shape}; a scalar tensor is wanted, the mean over the images")
    if not value.requires_grad:
        raise UserError("loss: does not depend on the trainable parameters of the net that it is given")
    if not math.isfinite(value.item()):
        raise UserError(f"loss: is {value.item()} for samples of the net; a finite number is wanted")
    return Parts(
        parts.net, parts.sample, parts.loss, parts.num_classes, shape=tuple(first.shape[1:]), dtype=first.dtype
    )


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


def fingerprint(function: Callable | None) -> str:
    """12 hex digits that change with the code of a function (not with what it calls), "" for None."""
    if function is None:
        return ""
    if isinstance(function, partial):
        return fingerprint_of(f"{fingerprint(function.func)} {function.args} {sorted(function.keywords.items())}")
    code = getattr(function, "__code__", None)
    content = _code(code) if code else f"{type(function).__module__}.{type(function).__qualname__}"
    return fingerprint_of(content)


def fingerprint_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _code(code: CodeType) -> str:
    constants = [_code(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, constants))
