"""The transformer of the ImageNet rows: a DiT with two time inputs, t and s (or t - s).

Peebles & Xie 2023 with the second embedding of Zhou et al. 2025 (IMM). State-dict names are those of the published
checkpoints. Shapes: B batch, C latent channels, h w latent grid, p patch, L tokens, D width, N heads, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_WIDTH = 256

# Published widths; the suffix of a model name ("DiT_XL_2") is the patch size.
SIZES = {
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
DIT_MODELS = {f"DiT_{size}_{p}": {**shape, "patch_size": p} for size, shape in SIZES.items() for p in (2, 4, 8)}


def sincos_grid(width: int, side: int) -> Tensor:
    """Fixed positions of a `side` x `side` grid: float32 [side*side, width], column half first, then the row half.

    Each half is [sin(x w) | cos(x w)] with w_k = 10000^(-k / (width/4)).
    """
    quarter = width // 4
    w = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * w  # [side, width/4]
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width/2]
    columns = table[None].expand(side, side, -1)
    rows = table[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x [B, L, D] and shift, scale [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TimeEmbedder(nn.Module):
    """A time [B] -> [B, D]: 256 sinusoids in float64, then an MLP."""

    freqs: Tensor  # of random sinusoids, where they are

    def __init__(self, width: int, embedding_type: str = "positional", scale: float = 1.0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        if embedding_type == "fourier":
            self.register_buffer("freqs", torch.randn(SINUSOID_WIDTH // 2) * scale)
        elif embedding_type != "positional":
            raise ValueError(f"embedding_type {embedding_type!r}: known are positional and fourier")

    def sinusoid(self, time: Tensor) -> Tensor:
        """float64 [B, 256], cosines first. float32 would lose the phase of large times."""
        if hasattr(self, "freqs"):
            frequencies = 2 * math.pi * self.freqs.double()
        else:
            half = SINUSOID_WIDTH // 2
            k = torch.arange(half, dtype=torch.float64, device=time.device)
            frequencies = torch.exp(k * (-math.log(10000.0) / half))
        angles = time.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(self.sinusoid(time).to(time.dtype))


class LabelEmbedder(nn.Module):
    """One-hot rows [B, K] -> [B, D]. An all-zero row means unconditional and has the table's row K."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float):
        super().__init__()
        self.dropout_prob = dropout_prob
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1 + (dropout_prob > 0), width)

    @staticmethod
    def index(labels: Tensor) -> Tensor:
        """int64 [B]: the largest entry of (row, 1 - sum of the row); the first one wins a tie."""
        return torch.cat([labels, 1 - labels.sum(dim=1, keepdim=True)], dim=1).argmax(dim=1)

    def forward(self, labels: Tensor, u_class: Tensor | None = None) -> Tensor:
        index = self.index(labels)
        if self.training and self.dropout_prob > 0:
            u = torch.rand(len(labels), device=labels.device) if u_class is None else u_class
            index = torch.where(u < self.dropout_prob, self.num_classes + 1, index)
        return self.embedding_table(index)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        if qk_norm:
            self.q_norm = nn.LayerNorm(width // num_heads)
            self.k_norm = nn.LayerNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x [B, N, L, D/N]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, N, L, D/N]
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x), approximate="tanh"))
        return self.drop(self.fc2(x))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition c [B, D] (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, dropout: float):
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        width = x.shape[-1:]
        x = x + gate_a[:, None] * self.attn(modulate(F.layer_norm(x, width, eps=1e-6), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(F.layer_norm(x, width, eps=1e-6), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class PatchEmbed(nn.Module):
    """[B, C, h, w] -> row-major tokens [B, L, D]."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """F(x, t, s, labels) of the moment matching model; x and the result are [B, C, h, w].

    `num_classes` (rows of the label table) is separate from the wrapper's label_dim: published sampling
    configurations rely on its default.
    """

    def __init__(
        self,
        img_resolution: int,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.0,
        num_classes: int = 1000,
        s_embed: bool = True,
        qk_norm: bool = False,
        embedding_kwargs: dict | None = None,
        dropout: float = 0.0,
        temb_mult: int = 1,
        **_unused,  # label_dim, out_channels, img_channels, skip: recorded in published configurations, without effect
    ):
        super().__init__()
        if img_resolution % patch_size or hidden_size % num_heads or hidden_size % 4 or temb_mult != 1:
            raise ValueError(
                f"DiT: img_resolution {img_resolution} must be a multiple of patch_size {patch_size}, hidden_size "
                f"{hidden_size} of num_heads {num_heads} and of 4, and temb_mult {temb_mult} must be 1"
            )
        self.patch_size = patch_size
        side = img_resolution // patch_size
        # A parameter: the published training updates it, so it is loaded and merged like the rest.
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, hidden_size))
        self.s_embedder = TimeEmbedder(hidden_size, **(embedding_kwargs or {})) if s_embed else None
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size, **(embedding_kwargs or {}))
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm, dropout) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: every block and the output start at zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.get_parameter("bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.s_embedder):
            for layer in (embedder.mlp[0], embedder.mlp[2]) if embedder is not None else ():
                nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        modulations = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        _, tokens, width = self.pos_embed.shape
        self.pos_embed.copy_(sincos_grid(width, math.isqrt(tokens))[None])

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, L, p p C] (row in the patch, column, channel) -> [B, C, h, w]."""
        p = self.patch_size
        B, L, _ = x.shape
        side = math.isqrt(L)
        x = x.view(B, side, side, p, p, -1)  # [B, row, column, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * p, side * p)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        class_labels: Tensor | None = None,
        u_class: Tensor | None = None,
    ) -> Tensor:
        """t and s are [B] or [1], already times time_scale; class_labels [B, K] or [1, K], None: unconditional.

        u_class [B]: uniforms for the class dropout of training, drawn here where they are not given.
        """
        # A time that the whole batch shares is embedded once: its row broadcasts in the sum.
        c = self.t_embedder(t)
        if s is not None and self.s_embedder is not None:
            c = c + self.s_embedder(s)
        if class_labels is None:
            class_labels = x.new_zeros(1, self.y_embedder.num_classes)
        c = (c + self.y_embedder(class_labels, u_class)).expand(len(x), -1)  # [B, D]
        x = self.x_embedder(x) + self.pos_embed  # [B, L, D]
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))
