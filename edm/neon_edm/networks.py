"""The two U-Nets of EDM: SongUNet (DDPM++, NCSN++; Song et al. 2021), DhariwalUNet (ADM; Dhariwal and Nichol 2021).

State-dict names are those of the published networks: `enc.32x32_conv`, `dec.8x8_in0`, ...
Shapes: B batch, C channels, R resolution, K classes, A augment labels, E width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_edm.layers import Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding, UNetBlock

AuxLayers = Callable[[int, int, int], dict[str, nn.Module]]  # (level, resolution, width) -> layers of the image pyramid


def no_aux(level: int, resolution: int, width: int) -> dict[str, nn.Module]:
    """No image pyramid beside the U-Net."""
    return {}


def build_encoder(
    block: Callable[..., UNetBlock],
    stem: Conv2d,
    stem_channels: int,
    img_resolution: int,
    widths: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    aux: AuxLayers = no_aux,
) -> tuple[dict[str, nn.Module], list[int]]:
    """The layers from high to low resolution, and the widths of the feature maps that they leave for the decoder."""
    layers: dict[str, nn.Module] = {}
    left = [stem_channels]
    for level, width in enumerate(widths):
        res = img_resolution >> level
        if level == 0:
            layers[f"{res}x{res}_conv"] = stem
        else:
            layers[f"{res}x{res}_down"] = block(left[-1], left[-1], down=True)
            layers |= aux(level, res, left[-1])
            left.append(left[-1])
        for i in range(num_blocks):
            layers[f"{res}x{res}_block{i}"] = block(left[-1], width, attention=res in attn_resolutions)
            left.append(width)
    return layers, left


def build_decoder(
    block: Callable[..., UNetBlock],
    left: Sequence[int],
    img_resolution: int,
    widths: Sequence[int],
    num_blocks: int,
    attends: Callable[[int, int], bool],
    aux: AuxLayers = no_aux,
) -> dict[str, nn.Module]:
    """The layers from low to high resolution. `attends(resolution, i)`: does block i of this level attend?"""
    layers: dict[str, nn.Module] = {}
    left = list(left)
    now = left[-1]
    for level, width in reversed(list(enumerate(widths))):
        res = img_resolution >> level
        if level == len(widths) - 1:
            layers[f"{res}x{res}_in0"] = block(now, now, attention=True)
            layers[f"{res}x{res}_in1"] = block(now, now)
        else:
            layers[f"{res}x{res}_up"] = block(now, now, up=True)
        for i in range(num_blocks + 1):
            layers[f"{res}x{res}_block{i}"] = block(now + left.pop(), width, attention=attends(res, i))
            now = width
        layers |= aux(level, res, width)
    return layers


def drop_labels(labels: Tensor, batch_size: int, label_dropout: float) -> Tensor:
    """Each row zeroed with probability `label_dropout`; one uniform draw per image from the default generator."""
    kept = torch.rand([batch_size, 1], device=labels.device) >= label_dropout
    return labels * kept.to(labels.dtype)


class SongUNet(nn.Module):
    """DDPM++ (positional embedding, standard encoder) or NCSN++ (Fourier embedding, residual encoder).

    Blocks attend with one head at any width. encoder_type and decoder_type `skip` run an image pyramid beside the
    U-Net, `residual` a pyramid of features. Raises ValueError on an unknown type.
    """

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
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        for what, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        widths = [model_channels * mult for mult in channel_mult]
        init: Init = {"mode": "xavier_uniform"}
        init_zero = {"mode": "xavier_uniform", "weight": 1e-5}
        init_attn: Init = {"mode": "xavier_uniform", "weight": math.sqrt(0.2)}

        def block(width_in: int, width_out: int, **kwargs) -> UNetBlock:
            return UNetBlock(
                width_in, width_out, emb_channels, num_heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
                resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
                init=init, init_zero=init_zero, init_attn=init_attn, **kwargs,
            )  # fmt: skip

        self.map_noise: PositionalEmbedding | FourierEmbedding
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        pyramid_channels = [in_channels]  # of the residual encoder, level by level

        def encoder_aux(level: int, res: int, width: int) -> dict[str, nn.Module]:
            resample: dict[str, Any] = {"down": True, "resample_filter": resample_filter}
            if encoder_type == "skip":
                return {
                    f"{res}x{res}_aux_down": Conv2d(in_channels, in_channels, kernel=0, **resample),
                    f"{res}x{res}_aux_skip": Conv2d(in_channels, width, kernel=1, init=init),
                }
            if encoder_type == "residual":
                pyramid_channels.append(width)
                layer = Conv2d(pyramid_channels[-2], width, kernel=3, fused_resample=True, init=init, **resample)
                return {f"{res}x{res}_aux_residual": layer}
            return {}

        def decoder_aux(level: int, res: int, width: int) -> dict[str, nn.Module]:
            layers: dict[str, nn.Module] = {}
            if decoder_type != "skip" and level > 0:
                return layers
            if decoder_type == "skip" and level < len(widths) - 1:
                layers[f"{res}x{res}_aux_up"] = Conv2d(
                    out_channels, out_channels, kernel=0, up=True, resample_filter=resample_filter
                )
            layers[f"{res}x{res}_aux_norm"] = GroupNorm(width, eps=1e-6)
            layers[f"{res}x{res}_aux_conv"] = Conv2d(width, out_channels, kernel=3, init=init_zero)
            return layers

        stem = Conv2d(in_channels, model_channels, kernel=3, init=init)
        enc, left = build_encoder(
            block, stem, model_channels, img_resolution, widths, num_blocks, attn_resolutions, encoder_aux
        )
        attends = lambda res, i: res in attn_resolutions and i == num_blocks  # noqa: E731
        dec = build_decoder(block, left, img_resolution, widths, num_blocks, attends, decoder_aux)
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, batch_size: int
    ) -> Tensor:
        """The vector that conditions every block, [B or 1, E]."""
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        e = torch.cat([sin, cos], dim=1)  # the published networks were trained with the halves swapped
        if self.map_label is not None:
            assert class_labels is not None
            if self.training and self.label_dropout:
                class_labels = drop_labels(class_labels, batch_size, self.label_dropout)
            e = e + self.map_label(class_labels * math.sqrt(self.map_label.weight.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, R, R], noise_labels [B] or [1], class_labels [B, K], augment_labels [B, A] -> [B, C', R, R]."""
        emb = self.embed(noise_labels, class_labels, augment_labels, x.shape[0])

        left: list[Tensor] = []
        pyramid = x
        for name, layer in self.enc.items():
            role = name.partition("_")[2]
            if role == "aux_down":
                pyramid = layer(pyramid)
            elif role == "aux_skip":
                x = left[-1] = x + layer(pyramid)
            elif role == "aux_residual":
                x = left[-1] = pyramid = (x + layer(pyramid)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                left.append(x)

        image: Tensor | None = None
        normed = x
        for name, layer in self.dec.items():
            role = name.partition("_")[2]
            if role == "aux_up":
                image = layer(image)
            elif role == "aux_norm":
                normed = layer(x)
            elif role == "aux_conv":
                out = layer(F.silu(normed))
                image = out if image is None else out + image
            else:
                x = layer(torch.cat([x, left.pop()], dim=1) if layer.in_channels != x.shape[1] else x, emb)
        assert image is not None, "the last layer makes it"
        return image


class DhariwalUNet(nn.Module):
    """ADM: heads of 64 channels, embeddings that scale and shift, attention in every block of listed resolutions."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        widths = [model_channels * mult for mult in channel_mult]
        init = {"mode": "kaiming_uniform", "weight": math.sqrt(1 / 3), "bias": math.sqrt(1 / 3)}
        init_zero = {"mode": "kaiming_uniform", "weight": 0.0, "bias": 0.0}

        def block(width_in: int, width_out: int, **kwargs) -> UNetBlock:
            return UNetBlock(
                width_in, width_out, emb_channels, channels_per_head=64, dropout=dropout,
                init=init, init_zero=init_zero, **kwargs,
            )  # fmt: skip

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        init_label = {"mode": "kaiming_normal", "weight": math.sqrt(label_dim)}
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=init_label) if label_dim else None

        stem = Conv2d(in_channels, widths[0], kernel=3, init=init)
        enc, left = build_encoder(block, stem, widths[0], img_resolution, widths, num_blocks, attn_resolutions)
        attends = lambda res, i: res in attn_resolutions  # noqa: E731
        dec = build_decoder(block, left, img_resolution, widths, num_blocks, attends)
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)
        self.out_norm = GroupNorm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, kernel=3, init=init_zero)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, batch_size: int
    ) -> Tensor:
        """The vector that conditions every block, [B or 1, E]."""
        e = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.map_label is not None:
            assert class_labels is not None
            if self.training and self.label_dropout:
                class_labels = drop_labels(class_labels, batch_size, self.label_dropout)
            e = e + self.map_label(class_labels)
        return F.silu(e)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, R, R], noise_labels [B] or [1], class_labels [B, K], augment_labels [B, A] -> [B, C', R, R]."""
        emb = self.embed(noise_labels, class_labels, augment_labels, x.shape[0])
        left: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            left.append(x)
        for layer in self.dec.values():
            x = layer(torch.cat([x, left.pop()], dim=1) if layer.in_channels != x.shape[1] else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
