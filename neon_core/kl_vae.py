"""The KL autoencoder of latent image models: pixels in [-1, 1] <-> a Gaussian over a latent grid.

One network for two published families: the KL-16 of MAR, which xAR uses (`kl16.ckpt`, latent-diffusion names), and the
Stability VAE, which IMM uses (diffusers names, in either of two spellings). Latent-diffusion names are the native ones;
`to_ldm_names` and `to_diffusers_names` translate state dicts. Architecture: Rombach et al. 2022, appendix G.

Shapes: B batch, C channels, H W pixels, h w latent grid, z latent channels, L = h w positions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Posterior(NamedTuple):
    """The diagonal Gaussian over the latent of an image; each [B, z, h, w]."""

    mean: Tensor
    std: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, with standard normal `eps` [B, z, h, w]."""
        return self.mean + self.std * eps


def posterior(moments: Tensor) -> Posterior:
    """Moments [B, 2z, h, w] of `AutoencoderKL.encode`, read as mean | log-variance, the latter clamped to [-30, 20]."""
    mean, logvar = moments.chunk(2, dim=1)  # [B, z, h, w]
    logvar = logvar.clamp(-30.0, 20.0)
    return Posterior(mean, torch.exp(0.5 * logvar), logvar)


class ResnetBlock(nn.Module):
    """Two norm-silu-conv stages beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the grid, added to its input."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))  # [B, 1, L, C]
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^-0.5
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves the sides: one row and column of zeros at bottom and right, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Block, attention, block at the coarsest grid."""

    def __init__(self, width: int, groups: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups, dropout)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, the first of which changes the width; attention after each if asked."""

    def __init__(self, width_in: int, width: int, num_blocks: int, attention: bool, groups: int, dropout: float):
        super().__init__()
        widths = [width_in] + [width] * (num_blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(w, width, groups, dropout) for w in widths)
        self.attn = nn.ModuleList(AttnBlock(width, groups) for _ in range(num_blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    """Pixels [B, C, H, W] -> [B, 2z, h, w]."""

    def __init__(self, in_channels, stem, widths, num_res_blocks, attention, z_channels, groups, dropout):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip([stem, *widths[:-1]], widths, strict=True)):
            level = Level(width_in, width, num_res_blocks, attention[i], groups, dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups, dropout)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, z, h, w] -> pixels [B, C, H, W]. `up.0` is the finest level and runs last."""

    def __init__(self, out_channels, widths, num_res_blocks, z_channels, groups, dropout):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, dropout)
        levels = []
        for i, (width, width_in) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level(width_in, width, num_res_blocks + 1, False, groups, dropout)
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two 1x1 convolutions around the latent. The defaults are MAR's KL-16.

    Level i has width ch * ch_mult[i]. Attention follows the encoder blocks of every level whose nominal side,
    `resolution` halved per level, is in `attn_resolutions`; real images may have any side that the levels divide.
    """

    def __init__(
        self,
        embed_dim: int = 16,
        ch_mult: Sequence[float] = (1, 1, 2, 2, 4),
        ch: int = 128,
        num_res_blocks: int = 2,
        resolution: int = 256,
        attn_resolutions: Sequence[int] = (16,),
        z_channels: int | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        z_channels = embed_dim if z_channels is None else z_channels
        out_channels = in_channels if out_channels is None else out_channels
        self.config: dict[str, Any] = {
            "embed_dim": embed_dim,
            "ch_mult": list(ch_mult),
            "ch": ch,
            "num_res_blocks": num_res_blocks,
            "resolution": resolution,
            "attn_resolutions": list(attn_resolutions),
            "z_channels": z_channels,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "norm_groups": norm_groups,
            "dropout": dropout,
        }
        widths = [round(ch * m) for m in ch_mult]
        attention = [(resolution >> i) in attn_resolutions for i in range(len(widths))]
        self.embed_dim = embed_dim
        self.stride = 2 ** (len(widths) - 1)  # pixels per latent position, each way
        self.encoder = Encoder(in_channels, ch, widths, num_res_blocks, attention, z_channels, norm_groups, dropout)
        self.decoder = Decoder(out_channels, widths, num_res_blocks, z_channels, norm_groups, dropout)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> AutoencoderKL:
        """The network of a diffusers `AutoencoderKL` config (its `config.json`), with latent-diffusion names inside."""
        widths = list(config.get("block_out_channels", [64]))
        kinds = config.get("down_block_types", ["DownEncoderBlock2D"] * len(widths))
        return cls(
            embed_dim=config.get("latent_channels", 4),
            ch_mult=[width / widths[0] for width in widths],
            ch=widths[0],
            num_res_blocks=config.get("layers_per_block", 1),
            attn_resolutions=[256 >> i for i, kind in enumerate(kinds) if kind == "AttnDownEncoderBlock2D"],
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            norm_groups=config.get("norm_num_groups", 32),
        )

    def encode(self, images: Tensor, chunk: int | None = None) -> Tensor:
        """Moments [B, 2z, h, w] (mean | unclamped log-variance, see `posterior`) of images [B, C, H, W] in [-1, 1]."""
        return _in_chunks(lambda x: self.quant_conv(self.encoder(x)), images, chunk)

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """Images [B, C, H, W], about [-1, 1], of unscaled latents [B, z, h, w]. `chunk`: so many at a time."""
        return _in_chunks(lambda z: self.decoder(self.post_quant_conv(z)), z, chunk)


def _in_chunks(function, x: Tensor, chunk: int | None) -> Tensor:
    if chunk is None or len(x) <= chunk:
        return function(x)
    return torch.cat([function(part) for part in x.split(chunk)])


# State-dict names. Diffusers counts the decoder's levels from the coarsest, latent diffusion from the finest, and holds
# the attention's projections as [C, C] matrices where latent diffusion has [C, C, 1, 1] convolutions.

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_LEGACY = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_ATTENTION_KEY = re.compile(r"\.(?:attentions\.\d+|attn\.\d+|attn_1)\.(.+)\.(weight|bias)$")


def weights_digest(module: nn.Module) -> str:
    """12 hex digits of all weights, in their order: identifies the autoencoder."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


def to_ldm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under latent-diffusion names, from either diffusers spelling; those names pass unchanged.

    Keys that belong to none of the three stay as they are, for strict loading to name them.
    """
    levels = 1 + max((int(m[1]) for k in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k))), default=-1)
    if levels == 0 and not any(".mid_block." in key for key in state):
        return dict(state)
    parts = {**_ATTENTION, **_ATTENTION_LEGACY}

    def rename(key: str) -> str:
        if m := re.search(r"\.attentions\.\d+\.(.+)\.(weight|bias)$", key):
            key = key[: m.start(1)] + parts.get(m[1], m[1]) + key[m.end(1) :]
        key = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", key)
        key = re.sub(r"\.mid_block\.attentions\.(\d+)\.", lambda m: f".mid.attn_{int(m[1]) + 1}.", key)
        key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
        key = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", key)
        key = key.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        key = key.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
        return key.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")

    out = {rename(key): value for key, value in state.items()}
    return {k: v[:, :, None, None] if _ATTENTION_KEY.search(k) and v.ndim == 2 else v for k, v in out.items()}


def to_diffusers_names(state: Mapping[str, Tensor], legacy: bool = False) -> dict[str, Tensor]:
    """The inverse of `to_ldm_names`, in the order in which diffusers registers its modules.

    `legacy`: query, key, value, proj_attn, as in files written before diffusers renamed its attention.
    """
    levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"decoder\.up\.(\d+)\.", k)))
    parts = {ours: theirs for theirs, ours in (_ATTENTION_LEGACY if legacy else _ATTENTION).items()}

    def rename(key: str) -> str:
        if m := _ATTENTION_KEY.search(key):
            key = key[: m.start(1)] + parts[m[1]] + key[m.end(1) :]
        key = re.sub(r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
        key = re.sub(r"\.mid\.attn_(\d+)\.", lambda m: f".mid_block.attentions.{int(m[1]) - 1}.", key)
        key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
        key = key.replace(".block.", ".resnets.").replace(".attn.", ".attentions.")
        key = key.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
        return key.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")

    def place(key: str) -> tuple:
        root, _, rest = key.partition(".")
        stages = ("conv_in", "down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out")
        stage = next((i for i, name in enumerate(stages) if rest.startswith(name + ".")), 0)
        level = re.match(r"(?:down|up)_blocks\.(\d+)\.", rest)
        kind = next((i for i, name in enumerate(("attentions.", "resnets.", "samplers.")) if name in rest), 0)
        roots = ("encoder", "decoder", "quant_conv", "post_quant_conv")
        return roots.index(root) if root in roots else len(roots), stage, int(level[1]) if level else 0, kind

    out = {rename(key): value for key, value in state.items()}
    out = {k: v[:, :, 0, 0] if _ATTENTION_KEY.search(k) and v.ndim == 4 else v for k, v in out.items()}
    return {key: out[key] for key in sorted(out, key=place)}
