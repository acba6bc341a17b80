"""The frozen tokenizer of VAR: convolutional encoder and decoder around the multi-scale quantizer.

Shapes: B batch, H W pixels, P side of the feature map (H / 16 in the published one), C code width, S scales. Pixels are
in [-1, 1].
State-dict names are those of the published `vae_ch160v4096z32.pth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_var.quantizer import MultiScaleQuantizer, Side


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around an identity or 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class PixelAttention(nn.Module):
    """Single-head self-attention over pixels, residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^-0.5
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Half the side; the zero padding is on the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, attention: bool):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = PixelAttention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, attention after each if wanted, and the way to the next resolution."""

    def __init__(self, widths: Sequence[int], dropout: float, attention: bool, resample: nn.Module | None, name: str):
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResBlock(a, b, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(PixelAttention(b) for _, b in pairs) if attention else nn.ModuleList()
        self.resample_name = name
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        resample = getattr(self, self.resample_name, None)
        return x if resample is None else resample(x)


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z_channels, h, w], half the side at every level but the last."""

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        in_channels: int = 3,
        z_channels: int,
        double_z: bool = False,
        using_sa: bool = True,
        using_mid_sa: bool = True,
    ):
        super().__init__()
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            widths = [width] + [ch * mult] * num_res_blocks
            width = widths[-1]
            resample = Downsample(width) if i != last else None
            self.down.append(_Level(widths, dropout, using_sa and i == last, resample, "downsample"))
        self.mid = _Middle(width, dropout, using_mid_sa)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, H, W], twice the side at every level but the last (`up.0`, the finest)."""

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        in_channels: int = 3,
        z_channels: int,
        using_sa: bool = True,
        using_mid_sa: bool = True,
    ):
        super().__init__()
        last = len(ch_mult) - 1
        width = ch * ch_mult[last]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Middle(width, dropout, using_mid_sa)
        levels = []
        for i in range(last, -1, -1):
            widths = [width] + [ch * ch_mult[i]] * (num_res_blocks + 1)
            width = widths[-1]
            resample = Upsample(width) if i != 0 else None
            levels.append(_Level(widths, dropout, using_sa and i == last, resample, "upsample"))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQVAE(nn.Module):
    """Images in [-1, 1] <-> S token maps. Frozen and in eval mode from the start."""

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.0,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        test_mode: bool = True,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ):
        """`ch_mult`: a level each, with a halving of the side between two; the published tokenizer's four halvings turn
        16 x 16 pixels into one feature."""
        super().__init__()
        self.downsampling, self.in_channels = 2 ** (len(ch_mult) - 1), in_channels
        sizes: dict[str, Any] = {
            "ch": ch, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks, "dropout": dropout,
            "in_channels": in_channels, "z_channels": z_channels,
        }  # fmt: skip
        self.encoder = Encoder(**sizes)
        self.decoder = Decoder(**sizes)
        self.quantize = MultiScaleQuantizer(
            vocab_size, z_channels, using_znorm, beta, default_qresi_counts, v_patch_nums, quant_resi, share_quant_resi
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        if test_mode:
            self.eval().requires_grad_(False)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.quantize.patch_nums

    def features(self, images: Tensor) -> Tensor:
        """[B, C, P, P], before quantization."""
        return self.quant_conv(self.encoder(images))

    def encode(
        self, images: Tensor, patch_nums: Sequence[Side] | None = None, num_scales: int | None = None
    ) -> list[Tensor]:
        """The tokens of every scale (or of the first `num_scales`), int64 [B, p_i^2] each."""
        pyramid = self.quantize.scales(self.features(images), patch_nums)
        return [tokens for tokens, _ in islice(pyramid, num_scales)]

    def decode(self, f_hat: Tensor) -> Tensor:
        """Images in [-1, 1] of a feature map [B, C, P, P]."""
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    def decode_tokens(self, tokens: Sequence[Tensor], same_shape: bool = True) -> list[Tensor]:
        """The image after every scale. `same_shape=False`: f_hat grows with the scales, so do the images (16 p_i)."""
        if len(tokens) != len(self.patch_nums):
            raise IndexError(f"{len(tokens)} token maps, the model has {len(self.patch_nums)} scales")
        maps = [self.quantize.maps(t) for t in tokens]
        return [self.decode(f_hat) for f_hat in self.quantize.accumulate(maps, same_shape)]

    def reconstruct(self, images: Tensor, patch_nums: Sequence[Side] | None = None) -> list[Tensor]:
        """The image after every scale, encoded and decoded."""
        return [self.decode(f_hat) for _, f_hat in self.quantize.scales(self.features(images), patch_nums)]

    @property
    def codes(self) -> Tensor:
        """The code vectors [V, C]."""
        return self.quantize.embedding.weight

    def tokens_to_input(self, tokens: Tensor) -> Tensor:
        """[B, L - p_0^2, C] teacher-forcing input of tokens [B, L] that hold all scales one after the other."""
        sizes = [p * p for p in self.patch_nums]
        counts = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        used = sizes[: counts.index(tokens.shape[1]) + 1]
        return self.quantize.teacher_input(torch.split(tokens, used, dim=1))
