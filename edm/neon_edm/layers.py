"""The layers of the EDM U-Nets (Karras et al. 2022, appendix F): float32 parameters, cast to the activations' dtype.

Shapes: B batch, C channels, H W pixels, E width of the embedding, N heads, L = H W positions, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Init = dict  # {"mode": ..., "weight": factor of the weights, "bias": factor of the biases}


def random_values(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """Fresh float32 values of one of the four classic distributions (Glorot and Bengio 2010, He et al. 2015).

    Raises ValueError on an unknown mode.
    """
    family, _, shape_of_law = mode.partition("_")
    scale = {"xavier": 2 / (fan_in + fan_out), "kaiming": 1 / fan_in}.get(family)
    if scale is None or shape_of_law not in ("uniform", "normal"):
        raise ValueError(f"unknown initialisation {mode!r}")
    if shape_of_law == "normal":
        return torch.randn(shape) * math.sqrt(scale)
    return (torch.rand(shape) * 2 - 1) * math.sqrt(3 * scale)  # variance 1/3 of a uniform on [-1, 1]


class Linear(nn.Module):
    """x W^T + b."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init | None = None):
        super().__init__()
        init = {"mode": "kaiming_normal", "weight": 1.0, "bias": 0.0} | (init or {})
        fans = (in_features, out_features)
        self.weight = nn.Parameter(random_values((out_features, in_features), init["mode"], *fans) * init["weight"])
        self.bias = nn.Parameter(random_values((out_features,), init["mode"], *fans) * init["bias"]) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """A convolution that may first double or halve the resolution with a low-pass filter.

    kernel = 0: only the resampling. fused: the filter and the kernel share their padding, and halving comes last.
    The buffer `resample_filter` [1, 1, L, L] exists only where something is resampled.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init: Init | None = None,
    ):
        super().__init__()
        if up and down:
            raise ValueError("a convolution cannot double and halve the resolution at once")
        self.up, self.down, self.fused = up, down, fused_resample and kernel > 0
        init = {"mode": "kaiming_normal", "weight": 1.0, "bias": 0.0} | (init or {})
        fans = (in_channels * kernel * kernel, out_channels * kernel * kernel)
        self.weight = self.bias = None
        if kernel:
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight = nn.Parameter(random_values(shape, init["mode"], *fans) * init["weight"])
        if kernel and bias:
            self.bias = nn.Parameter(random_values((out_channels,), init["mode"], *fans) * init["bias"])
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        low_pass = torch.outer(taps, taps)[None, None] / taps.sum() ** 2  # [1, 1, L, L]
        self.resample_filter: Tensor  # with `up` or `down`, else None
        self.register_buffer("resample_filter", low_pass if up or down else None)
        self.kernel_pad = kernel // 2
        self.filter_pad = (len(taps) - 1) // 2

    def _double(self, x: Tensor, padding: int) -> Tensor:
        low_pass = (4 * self.resample_filter).to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv_transpose2d(x, low_pass, groups=x.shape[1], stride=2, padding=padding)  # [B, C, 2H, 2W]

    def _halve(self, x: Tensor, padding: int) -> Tensor:
        low_pass = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, low_pass, groups=x.shape[1], stride=2, padding=padding)  # [B, C, H/2, W/2]

    def forward(self, x: Tensor) -> Tensor:
        kernel_pad, filter_pad = self.kernel_pad, self.filter_pad
        if self.up:
            shared = min(kernel_pad, filter_pad) if self.fused else 0
            x = self._double(x, filter_pad - shared)
            kernel_pad -= shared
        elif self.down and not self.fused:
            x = self._halve(x, filter_pad)
        elif self.down:
            kernel_pad += filter_pad
        if self.weight is not None:
            bias = None if self.bias is None or (self.down and self.fused) else self.bias.to(x.dtype)
            x = F.conv2d(x, self.weight.to(x.dtype), bias, padding=kernel_pad)
        if self.down and self.fused:
            x = self._halve(x, 0)
            if self.bias is not None:
                x = x + self.bias.to(x.dtype)[:, None, None]
        return x


class GroupNorm(nn.Module):
    """At most 32 groups of at least 4 channels."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def self_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """[B, 3C, H, W] -> [B, C, H, W]. Channel (head D + d) 3 + j of `qkv` is channel d of q, k, v for j = 0, 1, 2."""
    height, width = qkv.shape[2:]
    q, k, v = rearrange(qkv, "b (n d j) h w -> j b n (h w) d", n=num_heads, j=3).contiguous()  # each [B, N, L, D]
    a = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D)) v
    a = rearrange(a, "b n (h w) d -> b (n d) h w", h=height, w=width)
    # The layout of the input, on which the speed of the next layers and the place of each dropout draw depend.
    return a.contiguous(memory_format=torch.contiguous_format if qkv.is_contiguous() else torch.channels_last)


class UNetBlock(nn.Module):
    """Residual block with an embedding, optional resampling by 2, and optional self-attention behind it.

    num_heads None: one head per `channels_per_head` output channels, so none at all where the block is narrower.
    adaptive_scale: the embedding scales and shifts the second normalisation, else it is added in front of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init | None = None,
        init_zero: Init | None = None,
        init_attn: Init | None = None,
    ):
        super().__init__()
        init_zero = {"weight": 0.0} if init_zero is None else init_zero
        init_attn = init if init_attn is None else init_attn
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.num_heads = 0
        if attention:
            self.num_heads = out_channels // channels_per_head if num_heads is None else num_heads
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, init=init, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init=init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, init=init, **resample)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1, init=init_attn)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W] and emb [B, E] or [1, E] -> [B, out_channels, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        p = self.affine(emb).to(x.dtype)[:, :, None, None]  # [B, C or 2C, 1, 1]
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + p))
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            a = self_attention(self.qkv(self.norm2(x)), self.num_heads)
            x = (self.proj(a) + x) * self.skip_scale
        return x


class PositionalEmbedding(nn.Module):
    """[B] -> [cos(x f), sin(x f)], [B, num_channels], f geometric from 1 to 1/max_positions (`endpoint`: inclusive)."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        i = torch.arange(half, dtype=torch.float32, device=x.device)
        f = (1 / self.max_positions) ** (i / (half - (1 if self.endpoint else 0)))
        angle = torch.outer(x, f.to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[B] -> [cos(2 pi f x), sin(2 pi f x)], [B, num_channels]; f, `scale` times normal draws, is a buffer."""

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)
