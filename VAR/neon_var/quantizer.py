"""The residual pyramid of token maps: a feature map is the sum of S upsampled, convolved maps of code vectors.

Shapes: B batch, C code width, V codes, S scales, p_i side of scale i, P = p_{S-1} side of the feature map.
Tian et al. 2024 (arXiv 2404.02905), algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Side = int | tuple[int, int]


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which of `num_phi` shared convolutions scale `scale` of `num_scales` uses: the nearest of evenly spaced ticks.

    In float64 throughout: many scales lie half way between two ticks (also at S = 10, K = 4), so that rounding
    decides, and the published weights were trained with float64's decision.
    """
    position = scale / max(num_scales - 1, 1)
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - position)))


class ResidualConv(nn.Conv2d):
    """(1 - r) h + r conv(h), r = |quant_resi|."""

    def __init__(self, channels: int, quant_resi: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = abs(quant_resi)

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class _OnePhi(nn.Module):
    """Holds the only convolution under its published key."""

    def __init__(self, phi: nn.Module):
        super().__init__()
        self.qresi = phi


class _SharedPhi(nn.Module):
    """Holds K shared convolutions under their published keys."""

    def __init__(self, phi: Sequence[nn.Module]):
        super().__init__()
        self.qresi_ls = nn.ModuleList(phi)


def _pair(side: Side) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def _bicubic(h: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(h, size=size, mode="bicubic")


class MultiScaleQuantizer(nn.Module):
    """Vector quantizer over the scales `v_patch_nums`; the `quantize.*` part of the published VQVAE."""

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool = False,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ):
        super().__init__()
        self.vocab_size, self.width, self.cosine, self.beta = vocab_size, Cvae, using_znorm, beta
        self.patch_nums = tuple(v_patch_nums)
        self.share = share_quant_resi
        # Usage statistics of the VQVAE's own training. Not read here; in the published file, hence in the state dict.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), vocab_size))

        def phi() -> nn.Module:
            return ResidualConv(Cvae, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity()

        self.quant_resi: _OnePhi | _SharedPhi | nn.ModuleList
        if share_quant_resi == 1:
            self.quant_resi = _OnePhi(phi())
        elif share_quant_resi == 0:
            self.quant_resi = nn.ModuleList(phi() for _ in range(default_qresi_counts or len(self.patch_nums)))
        else:
            self.quant_resi = _SharedPhi([phi() for _ in range(share_quant_resi)])
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def phi_index(self, scale: int, num_scales: int) -> int:
        """Index of the convolution of scale `scale` where `num_scales` are in use."""
        return 0 if self.share == 1 else phi_index(scale, num_scales, len(self._phis()))

    def _phis(self) -> list[nn.Module] | nn.ModuleList:
        if isinstance(self.quant_resi, _OnePhi):
            return [self.quant_resi.qresi]
        return self.quant_resi.qresi_ls if isinstance(self.quant_resi, _SharedPhi) else self.quant_resi

    def contribution(
        self, scale: int, h: Tensor, size: tuple[int, int] | None, num_scales: int | None = None
    ) -> Tensor:
        """phi_scale(bicubic(h)): what the codes h [B, C, p, p] add to the feature map; size None leaves h as large."""
        num_scales = num_scales or len(self.patch_nums)
        if size is not None and scale < num_scales - 1:
            h = _bicubic(h, size)
        return self._phis()[self.phi_index(scale, num_scales)](h)

    def nearest(self, z: Tensor, code_sq: Tensor | None = None) -> Tensor:
        """int64 [N], the code nearest to each row of z [N, C] (by angle with `using_znorm`)."""
        codes = self.embedding.weight
        if self.cosine:
            return (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(dim=1)
        code_sq = codes.square().sum(dim=1) if code_sq is None else code_sq
        distance = z.square().sum(dim=1, keepdim=True) + code_sq  # [N, V]
        return distance.addmm_(z, codes.T, alpha=-2).argmin(dim=1)

    def scales(self, f: Tensor, patch_nums: Sequence[Side] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens [B, p_h p_w], f_hat [B, C, P, P]) of every scale of the feature map f, coarse to fine.

        `patch_nums` replaces the model's scales; the last must be the size of f.
        """
        sides = [_pair(p) for p in (patch_nums or self.patch_nums)]
        size = (f.shape[-2], f.shape[-1])
        if sides[-1] != size:
            raise ValueError(f"the last scale {sides[-1]} must be the size of the feature map {size}")
        rest, f_hat = f.detach().float(), torch.zeros_like(f, dtype=torch.float32)
        code_sq = self.embedding.weight.square().sum(dim=1)
        for i, (p_h, p_w) in enumerate(sides):
            z = rest if i == len(sides) - 1 else F.adaptive_avg_pool2d(rest, (p_h, p_w))
            tokens = self.nearest(z.permute(0, 2, 3, 1).reshape(-1, self.width), code_sq).view(len(f), p_h * p_w)
            update = self.contribution(i, self.maps(tokens, (p_h, p_w)), size, len(sides))
            f_hat, rest = f_hat + update, rest - update
            yield tokens, f_hat

    def maps(self, tokens: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, p_h, p_w] code vectors of tokens [B, p_h p_w]; square where no size is given."""
        p_h, p_w = size or (round(tokens.shape[1] ** 0.5),) * 2
        return self.embedding(tokens).transpose(1, 2).reshape(len(tokens), self.width, p_h, p_w)

    def add_scale(self, scale: int, f_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(f_hat with scale `scale`'s codes h [B, C, p, p] added, the map that the next scale starts from).

        The second is f_hat itself after the last scale, else f_hat averaged down to the next side.
        """
        f_hat = f_hat + self.contribution(scale, h, (f_hat.shape[-2], f_hat.shape[-1]))
        if scale == len(self.patch_nums) - 1:
            return f_hat, f_hat
        return f_hat, F.adaptive_avg_pool2d(f_hat, self.patch_nums[scale + 1])

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """[B, sum_{i>=1} p_i^2, C]: what the transformer reads in teacher forcing, from the tokens of each scale.

        With fewer scales than the model has, the inputs of just these; empty for one.
        """
        side = self.patch_nums[-1]
        f_hat = self.embedding.weight.new_zeros(len(tokens[0]), self.width, side, side)
        inputs = [f_hat.new_empty(len(f_hat), 0, self.width)]
        for i, scale_tokens in enumerate(tokens[:-1]):
            f_hat, following = self.add_scale(i, f_hat, self.maps(scale_tokens))
            inputs.append(following.flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1)

    def accumulate(self, maps: Sequence[Tensor], all_to_max_scale: bool = True) -> Iterator[Tensor]:
        """f_hat after each scale's code map [B, C, p_i, p_i]. `all_to_max_scale=False`: f_hat grows from p_0 to P."""
        side = self.patch_nums[-1] if all_to_max_scale else self.patch_nums[0]
        f_hat = maps[0].new_zeros(len(maps[0]), self.width, side, side)
        for i, p in enumerate(self.patch_nums):
            if not all_to_max_scale and i > 0:
                f_hat = _bicubic(f_hat, (p, p))
            f_hat = f_hat + self.contribution(i, maps[i], (side, side) if all_to_max_scale else None)
            yield f_hat
