"""The FID network: Inception v3 of the TensorFlow graph of 2015-12-05, with torch-fidelity's state-dict names.

Shapes: B batch, C channels, H W pixels. Images are uint8 RGB in 0..255; the network eats float32 in [-1, 1), 299 x 299.
Source: Szegedy et al. 2016, and the published graph where it departs from the paper (noted where it matters).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
FEATURES = ("64", "192", "768", "2048", "logits_unbiased", "logits")


# --------------------------------------------------------------------------------------------- from uint8 to the input


def resize_tf1(images: Tensor, size: tuple[int, int] = (INPUT_SIZE, INPUT_SIZE)) -> Tensor:
    """[B, C, H, W] of any dtype -> float32 [B, C, *size], as TensorFlow 1 resizes bilinearly; not rounded.

    Target pixel i reads the source at i * (n / m): no half-pixel shift, and no antialiasing when shrinking either.
    `torch.nn.functional.interpolate` gives other numbers in every mode.
    """
    x = images.to(torch.float32)
    low, high, fraction = _source_samples(x.shape[-1], size[1], x.device)
    x = _between(x.index_select(-1, low), x.index_select(-1, high), fraction)  # [B, C, H, w]
    low, high, fraction = _source_samples(x.shape[-2], size[0], x.device)
    return _between(x.index_select(-2, low), x.index_select(-2, high), fraction[:, None])  # [B, C, h, w]


@cache
def _source_samples(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `target` positions: the two neighbours' indices and the float32 weight of the second. Made and copied
    once for a size and a device."""
    position = np.arange(target, dtype=np.float32) * np.float32(source / target)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    fraction = position - low.astype(np.float32)
    with torch.inference_mode(False):  # whatever mode the first caller is in
        return (
            torch.from_numpy(low).to(device),
            torch.from_numpy(high).to(device),
            torch.from_numpy(fraction).to(device),
        )


def _between(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    return a + (b - a) * fraction


def normalise(x: Tensor) -> Tensor:
    """0..255 -> [-1, 1): (x - 128) / 128, both steps exact up to the rounding of x - 128."""
    return (x - 128) / 128


# -------------------------------------------------------------------------------------------------- the building blocks


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU. `fold` turns the first two into one convolution with bias."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold(self) -> None:
        """conv <- bn(conv(.)) with the running statistics; the product is formed in float64."""
        conv, bn = self.conv, self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None and bn.running_mean is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        shift = bn.bias.double() - bn.running_mean.double() * scale
        conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        self.bn = nn.Identity()


class Conv(NamedTuple):
    """One convolution of a branch. Stride 1 keeps the size (zero padding), stride 2 has no padding."""

    name: str
    kernel: int | tuple[int, int]
    channels: int
    stride: int = 1

    def build(self, c_in: int) -> ConvUnit:
        kernel = (self.kernel,) * 2 if isinstance(self.kernel, int) else self.kernel
        padding = tuple(side // 2 for side in kernel) if self.stride == 1 else 0
        return ConvUnit(c_in, self.channels, kernel, self.stride, padding)


# The border is left out of the averages' divisor, as in TensorFlow.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
max_pool_half = partial(F.max_pool2d, kernel_size=3, stride=2)

Step = Conv | list[Conv] | Callable[[Tensor], Tensor]  # a list: siblings on one input, outputs concatenated


class Mixed(nn.Module):
    """Branches on one input, their outputs concatenated along the channels."""

    def __init__(self, c_in: int, branches: list[list[Step]]):
        super().__init__()
        self.branches = branches
        self.out_channels = sum(self._build(branch, c_in) for branch in branches)

    def _build(self, branch: list[Step], width: int) -> int:
        for step in branch:
            convs = _siblings(step)
            for conv in convs:
                self.add_module(conv.name, conv.build(width))
            width = sum(conv.channels for conv in convs) or width  # a pool keeps the width
        return width

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = [x]
            for step in branch:
                if isinstance(step, Conv | list):
                    y = [getattr(self, conv.name)(y[0]) for conv in _siblings(step)]
                else:
                    y = [step(y[0])]
            outputs += y
        return torch.cat(outputs, dim=1)


def _siblings(step: Step) -> list[Conv]:
    if isinstance(step, Conv):
        return [step]
    return step if isinstance(step, list) else []


def block_a(pool_channels: int) -> list[list[Step]]:
    return [
        [Conv("branch1x1", 1, 64)],
        [Conv("branch5x5_1", 1, 48), Conv("branch5x5_2", 5, 64)],
        [Conv("branch3x3dbl_1", 1, 64), Conv("branch3x3dbl_2", 3, 96), Conv("branch3x3dbl_3", 3, 96)],
        [average_pool, Conv("branch_pool", 1, pool_channels)],
    ]


def block_b() -> list[list[Step]]:
    return [
        [Conv("branch3x3", 3, 384, stride=2)],
        [Conv("branch3x3dbl_1", 1, 64), Conv("branch3x3dbl_2", 3, 96), Conv("branch3x3dbl_3", 3, 96, stride=2)],
        [max_pool_half],
    ]


def block_c(c: int) -> list[list[Step]]:
    row, column = (1, 7), (7, 1)
    double: list[tuple[int | tuple[int, int], int]] = [(1, c), (column, c), (row, c), (column, c), (row, 192)]
    return [
        [Conv("branch1x1", 1, 192)],
        [Conv("branch7x7_1", 1, c), Conv("branch7x7_2", row, c), Conv("branch7x7_3", column, 192)],
        [Conv(f"branch7x7dbl_{i}", kernel, channels) for i, (kernel, channels) in enumerate(double, start=1)],
        [average_pool, Conv("branch_pool", 1, 192)],
    ]


def block_d() -> list[list[Step]]:
    wide: list[tuple[int | tuple[int, int], int]] = [(1, 1), ((1, 7), 1), ((7, 1), 1), (3, 2)]
    return [
        [Conv("branch3x3_1", 1, 192), Conv("branch3x3_2", 3, 320, stride=2)],
        [Conv(f"branch7x7x3_{i}", kernel, 192, stride) for i, (kernel, stride) in enumerate(wide, start=1)],
        [max_pool_half],
    ]


def block_e(pool: Callable[[Tensor], Tensor]) -> list[list[Step]]:
    def cross(name: str) -> list[Conv]:
        return [Conv(f"{name}a", (1, 3), 384), Conv(f"{name}b", (3, 1), 384)]

    return [
        [Conv("branch1x1", 1, 320)],
        [Conv("branch3x3_1", 1, 384), cross("branch3x3_2")],
        [Conv("branch3x3dbl_1", 1, 448), Conv("branch3x3dbl_2", 3, 384), cross("branch3x3dbl_3")],
        [pool, Conv("branch_pool", 1, 192)],
    ]


# ---------------------------------------------------------------------------------------------------------- the network


class InceptionV3(nn.Module):
    """The whole network. `forward` returns the requested features of one pass and stops after the last of them."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        width = 192
        for name, branches in {
            "Mixed_5b": block_a(32),
            "Mixed_5c": block_a(64),
            "Mixed_5d": block_a(64),
            "Mixed_6a": block_b(),
            "Mixed_6b": block_c(128),
            "Mixed_6c": block_c(160),
            "Mixed_6d": block_c(160),
            "Mixed_6e": block_c(192),
            "Mixed_7a": block_d(),
            "Mixed_7b": block_e(average_pool),
            "Mixed_7c": block_e(max_pool),  # a maximum here and an average in 7b: an oddity of the graph
        }.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.out_channels
        self.fc = nn.Linear(width, NUM_CLASSES)

    def _stages(self) -> list[tuple[str, list[Callable[[Tensor], Tensor]]]]:
        """(name of the feature after the stage, its layers)."""
        mixed = [module for module in self.children() if isinstance(module, Mixed)]  # 5b .. 6e, 7a .. 7c
        return [
            ("64", [self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, max_pool_half]),  # [B, 64, 73, 73]
            ("192", [self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, max_pool_half]),  # [B, 192, 35, 35]
            ("768", mixed[:8]),  # [B, 768, 17, 17]
            ("2048", mixed[8:]),  # [B, 2048, 8, 8]
        ]

    def forward(self, x: Tensor, features: Collection[str] = ("2048", "logits_unbiased")) -> dict[str, Tensor]:
        """[B, 3, 299, 299] in [-1, 1) -> {name: [B, D]}. All but the logits are averages over the positions.

        "logits_unbiased" is the last layer without its bias, which the Inception Score takes.
        """
        unknown = set(features) - set(FEATURES)
        if unknown:
            raise ValueError(f"unknown features {sorted(unknown)}; choose from {FEATURES}")
        outputs = {}
        for name, layers in self._stages():
            for layer in layers:
                x = layer(x)
            pooled = x.mean(dim=(2, 3))
            outputs[name] = pooled
            if set(features) <= set(outputs):
                break
        if "logits_unbiased" in features or "logits" in features:
            outputs["logits_unbiased"] = F.linear(pooled, self.fc.weight)
            outputs["logits"] = outputs["logits_unbiased"] + self.fc.bias
        return {name: outputs[name] for name in features}


def folded(net: InceptionV3) -> InceptionV3:
    """A copy for inference only: batch norm folded into the convolutions, channels-last weights, no gradients.

    Same numbers to 1e-7 of their size and about 1.5 times the speed on a CPU. Its state dict has other names.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, ConvUnit):
            module.fold()
    return net.to(memory_format=torch.channels_last)
