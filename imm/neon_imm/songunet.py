"""The U-Net of the CIFAR-10 model: DDPM++ (Song et al. 2021, as in Karras et al. 2022) with a second time input.

The embedding path, up to the output of every block's affine layer, runs in float64 as in the published model.
State-dict names are the published ones. Shapes: B batch, C channels, H W pixels, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_core.precision import autocast_dtype

SKIP_SCALE = math.sqrt(0.5)
NORM_EPS = 1e-6


def positional_table(time: Tensor, width: int) -> Tensor:
    """float64 [B, width]: [sin | cos] of time * 10000^(-k / (width/2 - 1)), the last frequency being 1/10000."""
    half = width // 2
    k = torch.arange(half, dtype=torch.float64, device=time.device)
    angles = time.double()[:, None] * 10000.0 ** (-k / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Linear(nn.Module):
    """A linear layer that computes in its input's precision, whatever that of its weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, in_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv(nn.Module):
    """A `kernel` x `kernel` convolution, after resampling by 2 with a separable filter if `resample` is up or down.

    It computes in its input's precision, or in autocast's, which then converts what is not in it yet.
    """

    resample_filter: Tensor  # [1, 1, taps, taps], where `resample` is

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, resample: str | None = None,
        resample_filter: Sequence[float] = (1, 1), gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.resample = resample
        weight = torch.empty(out_channels, in_channels, kernel, kernel)
        # Fan-in counts the kernel, fan-out too, which is what xavier_uniform_ does for a convolution.
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight, gain=gain))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        if resample:
            f = torch.as_tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (f.outer(f) / f.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        cast = torch.Tensor.to if autocast_dtype(x.device) is None else lambda weight, dtype: weight
        if self.resample:
            channels = x.shape[1]
            taps = self.resample_filter.shape[-1]
            f = cast(self.resample_filter, x.dtype).expand(channels, 1, taps, taps)
            how: dict[str, Any] = {"stride": 2, "padding": (taps - 1) // 2, "groups": channels}
            x = F.conv_transpose2d(x, 4 * f, **how) if self.resample == "up" else F.conv2d(x, f, **how)
        weight, bias = cast(self.weight, x.dtype), cast(self.bias, x.dtype)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class GroupNorm(nn.GroupNorm):
    """Groups of at least four channels, 32 at most."""

    def __init__(self, channels: int):
        super().__init__(min(32, channels // 4), channels, eps=NORM_EPS)


class UNetBlock(nn.Module):
    """Residual block with the embedding added between its convolutions, and single-head attention after it."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, resample: str | None = None,
        attention: bool = False, dropout: float = 0.0, resample_filter: Sequence[float] = (1, 1),
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.dropout = in_channels, dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample, resample_filter)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=1e-5)
        changes = resample or in_channels != out_channels
        self.skip = Conv(in_channels, out_channels, 1, resample, resample_filter) if changes else None
        self.norm2 = GroupNorm(out_channels) if attention else None
        self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2)) if attention else None
        self.proj = Conv(out_channels, out_channels, 1, gain=1e-5) if attention else None

    def attend(self, x: Tensor) -> Tensor:
        assert self.norm2 is not None and self.qkv is not None and self.proj is not None
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).view(B, C, 3, H * W).permute(2, 0, 3, 1)  # 3 x [B, HW, C]
        x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # [B, HW, C]
        return self.proj(x.transpose(1, 2).contiguous().view(B, C, H, W))  # dropout masks follow the memory layout

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb).to(h.dtype)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return x if self.qkv is None else (self.attend(x) + x) * SKIP_SCALE


class SongUNet(nn.Module):
    """F(x, t, s, labels): x and the result are [B, C, H, W], H = W = img_resolution (or another multiple of the
    deepest level's factor)."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        s_embed: bool = True,
        **_unused,  # recorded in published configurations, without effect
    ):
        super().__init__()
        for name, value, known in (
            ("embedding_type", embedding_type, "positional"),
            ("encoder_type", encoder_type, "standard"),
            ("decoder_type", decoder_type, "standard"),
        ):
            if value != known:
                raise ValueError(f"SongUNet of IMM: {name} {value!r} is not supported, only {known!r} was published")
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        self.noise_channels = model_channels * channel_mult_noise
        self.map_label = Linear(label_dim, self.noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, self.noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(self.noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_layer0_s = Linear(self.noise_channels, emb_channels) if s_embed else None
        self.map_layer1_s = Linear(emb_channels, emb_channels) if s_embed else None

        def block(width_in: int, width_out: int, **options) -> UNetBlock:
            return UNetBlock(width_in, width_out, emb_channels, dropout=dropout, resample_filter=resample_filter,
                             **options)  # fmt: skip

        # Finest to coarsest. Every output is a skip of the decoder.
        self.enc = nn.ModuleDict()
        width, skips = model_channels, []
        for level, mult in enumerate(channel_mult):
            side = img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(in_channels, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(width, width, resample="down")
            skips.append(width)
            for i in range(num_blocks):
                attention = side in attn_resolutions
                self.enc[f"{side}x{side}_block{i}"] = block(width, model_channels * mult, attention=attention)
                width = model_channels * mult
                skips.append(width)

        # Coarsest to finest; a `block` takes the next skip beside what comes from below.
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            side = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{side}x{side}_in0"] = block(width, width, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, resample="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                name = f"{side}x{side}_block{i}"
                self.dec[name] = block(width + skips.pop(), model_channels * mult, attention=attention)
                width = model_channels * mult
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(width)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

    def embed(
        self, t: Tensor, s: Tensor | None = None, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """float64 [B, E] (B of t, or of the labels), what enters every affine layer."""
        emb = positional_table(t, self.noise_channels)
        if self.map_label is not None and class_labels is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                kept = torch.rand([len(labels), 1], device=labels.device) >= self.label_dropout
                labels = labels * kept.to(labels.dtype)
            emb = emb + self.map_label(labels.double() * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.double())
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if s is not None and self.map_layer0_s is not None and self.map_layer1_s is not None:
            table = positional_table(s, self.noise_channels)
            emb = emb + self.map_layer1_s(F.silu(self.map_layer0_s(table)))
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """t and s are [B] or [1], already times time_scale; class_labels [B, label_dim] or [1, label_dim]."""
        emb = self.embed(t, s, class_labels, augment_labels)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        *blocks, aux_norm, aux_conv = self.dec.values()
        for block in blocks:
            if block.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return aux_conv(F.silu(aux_norm(x)))
