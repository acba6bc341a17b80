"""The VAR transformer: predicts a whole token map at a time from the coarser ones.

Shapes: B sequences (images; twice as many under guidance), D width, H heads, c = D / H, S scales with p_i^2 tokens
each, L = sum p_i^2 tokens, l tokens of the scale at hand, C code width, V codes.
Tian et al. 2024 (arXiv 2404.02905). State-dict names are those of the published `var_d*.pth`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neon_core.precision import autocast_dtype, product_layers
from neon_run.replay import Calls

MAX_LOG_SCALE = math.log(100)  # of the learned attention temperature
Modulation = tuple[Tensor, ...]  # gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2, each [B, 1, D]


class SelfAttention(nn.Module):
    """Multi-head attention; with `l2_norm` over directions, at a learned temperature per head."""

    zero_k_bias: Tensor  # [D]

    def __init__(self, width: int, num_heads: int, l2_norm: bool):
        super().__init__()
        self.num_heads, self.l2_norm = num_heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.softmax_scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // num_heads)

    def constants(self) -> tuple[Tensor, Tensor | None]:
        """What no input changes: the bias of q, k and v [3D], and the temperatures [1, H, 1, 1]."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        return bias, self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp() if self.l2_norm else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
        constants: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """x [B, l, D] -> [B, l, D]. `mask` is additive [1, 1, l, l]. A `cache` of keys and values [B, H, L', c] holds
        the `start` tokens before x, all of which x may read; x's own are written behind them, if there is room."""
        B, l, D = x.shape
        bias, temperature = constants or self.constants()
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(B, l, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, l, c]
        if temperature is not None:
            q = (F.normalize(q, dim=-1) * temperature).to(v.dtype)
            k = F.normalize(k, dim=-1).to(v.dtype)
        if cache is not None:
            keys, values = cache
            if start == keys.shape[2]:  # the last scale, whose tokens nothing reads again
                k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
            else:
                keys[:, :, start : start + l] = k
                values[:, :, start : start + l] = v
                k, v = keys[:, :, : start + l], values[:, :, : start + l]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)
        return self.proj(out.transpose(1, 2).reshape(B, l, D))


class FeedForward(nn.Module):
    """Linear, tanh GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _keep(branch: Tensor, keep: Tensor | None, drop_rate: float) -> Tensor:
    """Stochastic depth: rows of the branch where `keep` [B] is 0 vanish, the others make up for them."""
    if keep is None:
        return branch
    return branch * (keep / (1 - drop_rate)).to(branch.dtype)[:, None, None]


class Block(nn.Module):
    """Attention and feed-forward, both modulated and gated by the class (AdaLN)."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, drop_path: float, eps: float, shared_aln: bool, l2_norm: bool
    ):
        super().__init__()
        self.width, self.eps, self.drop_path = width, eps, drop_path
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        self.attn = SelfAttention(width, num_heads, l2_norm)
        self.ffn = FeedForward(width, hidden)
        if not shared_aln:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, cond: Tensor) -> Modulation:
        """From the class embedding [B, D], or from the shared projection [B, 1, 6, D]."""
        six = self.ada_gss + cond if cond.dim() == 4 else self.ada_lin(cond).view(-1, 1, 6, self.width)
        gammas, scales, shifts = six.split(2, dim=2)
        return (*gammas.unbind(2), *(1 + scales).unbind(2), *shifts.unbind(2))

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        modulation: Modulation | None = None,
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
        keep: Tensor | None = None,
        constants: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """x [B, l, D] -> [B, l, D]. `modulation` spares its computation from `cond`, `constants` that of the
        attention's; `keep` [2, B] drops branches."""
        if modulation is None:
            assert cond is not None
            modulation = self.modulation(cond)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        keep_attn, keep_ffn = (None, None) if keep is None else keep

        def norm(x: Tensor) -> Tensor:
            return F.layer_norm(x, (self.width,), eps=self.eps)

        attended = self.attn(norm(x) * scale1 + shift1, mask, cache, start, constants)
        x = x + _keep(attended * gamma1, keep_attn, self.drop_path)
        return x + _keep(self.ffn(norm(x) * scale2 + shift2) * gamma2, keep_ffn, self.drop_path)


class HeadNorm(nn.Module):
    """The modulated layer norm before the head; always from the raw class embedding."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, cond: Tensor) -> Modulation:
        """(1 + scale, shift), each [B, 1, D]."""
        scale, shift = self.ada_lin(cond).view(-1, 1, 2, self.width).unbind(2)
        return 1 + scale, shift

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        scale, shift = modulation
        return F.layer_norm(x, (self.width,), eps=self.eps) * scale + shift


@dataclass
class Context:
    """What stays the same over the scales of one sampling call, and the keys and values of the tokens so far."""

    start_token: Tensor  # [B, 1, D], the class embedding
    positions: Tensor  # [1, L, D], level and position embeddings
    modulations: list[Modulation]  # per block
    head_modulation: Modulation
    constants: list[tuple[Tensor, Tensor | None]]  # per block, of its attention
    caches: list[tuple[Tensor, Tensor]]  # per block: keys, values [B, H, L', c] of all scales but the last
    scale: int = 0  # the next one
    length: int = 0  # tokens of the scales before

    def fixed(self) -> dict[str, Any]:
        """What no scale changes."""
        names = ("start_token", "positions", "modulations", "head_modulation", "constants")
        return {name: getattr(self, name) for name in names}


class VAR(nn.Module):
    """Class-conditional next-scale transformer over the tokens of a VQVAE with V codes of width C."""

    calls = Calls()
    lvl_1L: Tensor  # [1, L], the scale of every token
    attn_bias_for_masking: Tensor  # [1, 1, L, L], added

    def __init__(
        self,
        vocab_size: int = 4096,
        Cvae: int = 32,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = True,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    ):
        super().__init__()
        self.vocab_size, self.Cvae, self.num_classes = vocab_size, Cvae, num_classes
        self.depth, self.width, self.num_heads = depth, embed_dim, num_heads
        self.cond_drop_rate, self.patch_nums = cond_drop_rate, tuple(patch_nums)
        self.sizes = [p * p for p in self.patch_nums]  # tokens per scale
        self.num_tokens = sum(self.sizes)

        self.pos_start = nn.Parameter(torch.empty(1, self.sizes[0], embed_dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.num_tokens, embed_dim))
        level = torch.cat([torch.full((n,), i) for i, n in enumerate(self.sizes)])  # [L]
        self.register_buffer("lvl_1L", level[None])
        sees = level[:, None] >= level[None, :]
        self.register_buffer("attn_bias_for_masking", torch.where(sees, 0.0, -torch.inf)[None, None])
        self.word_embed = nn.Linear(Cvae, embed_dim)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)  # the last row is "no class"
        self.lvl_embed = nn.Embedding(len(self.sizes), embed_dim)
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 6 * embed_dim))
        hidden = round(embed_dim * mlp_ratio)
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden, p, norm_eps, shared_aln, attn_l2_norm) for p in drop_path
        )
        self.head_nm = HeadNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, vocab_size)

    # Shared by training and sampling

    def positions(self) -> Tensor:
        """[1, L, D] what is added to every token."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def block_condition(self, cond: Tensor) -> Tensor:
        """What the blocks take: the class embedding [B, D], or its shared projection [B, 1, 6, D]."""
        return self.shared_ada_lin(cond).view(-1, 1, 6, self.width) if hasattr(self, "shared_ada_lin") else cond

    def logits(self, x: Tensor, modulation: Modulation) -> Tensor:
        """float32 [B, l, V] of the blocks' output [B, l, D]."""
        return self.head(self.head_nm(x.float(), modulation).float()).float()

    # Training

    @property
    def drop_path_blocks(self) -> list[int]:
        """The blocks that stochastic depth touches (never the first)."""
        return [i for i, block in enumerate(self._blocks()) if block.drop_path > 0]

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))  # a ModuleList tells types nothing of its items

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        label_drop_uniform: Tensor | None = None,
        drop_path_keep: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, l, V] of all scales at once (teacher forcing), or of as many as `inputs` covers.

        inputs: [B, l - p_0^2, C] from `MultiScaleQuantizer.teacher_input`. label_drop_uniform [B]: the class is
        dropped where it is below `cond_drop_rate`; None keeps all. drop_path_keep: 0 or 1 [2 * drop_path_blocks, B],
        attention then feed-forward of each block; None keeps all.
        """
        B, first = len(labels), self.sizes[0]
        l = first + inputs.shape[1]
        if label_drop_uniform is not None:
            labels = torch.where(label_drop_uniform < self.cond_drop_rate, self.num_classes, labels)
        with torch.autocast(inputs.device.type, enabled=False):
            cond = self.class_emb(labels)  # [B, D]
            x = cond[:, None].expand(B, first, -1) + self.pos_start
            # Also where there is nothing to embed, so that word_embed has a gradient (zero) in every stage.
            x = torch.cat((x, self.word_embed(inputs.float())), dim=1) + self.positions()[:, :l]
            mask = self.attn_bias_for_masking[:, :, :l, :l]
        # Half precision keeps the whole residual stream in half here, unlike in sampling.
        dtype = autocast_dtype(x.device) or x.dtype
        x, mask, block_cond = x.to(dtype), mask.to(dtype), self.block_condition(cond).to(dtype)
        keeps: list[Tensor | None] = [None] * self.depth
        if drop_path_keep is not None:
            for i, keep in zip(self.drop_path_blocks, drop_path_keep.view(-1, 2, B), strict=True):
                keeps[i] = keep
        for block, keep in zip(self.blocks, keeps, strict=True):
            x = block(x, block_cond, mask=mask, keep=keep)
        return self.logits(x, self.head_nm.modulation(cond))

    # Sampling

    def autocast_layers(self) -> list[nn.Module]:
        """The layers that autocast runs in half precision: all but the embedding of the code vectors."""
        return [layer for layer in product_layers(self) if layer is not self.word_embed]

    def begin(self, labels: Tensor) -> Context:
        """A new sampling call for labels [B] (`num_classes`: no class): everything that no scale changes."""
        with torch.autocast(labels.device.type, enabled=False):
            cond = self.class_emb(labels)  # [B, D]
            positions = self.positions()
        block_cond = self.block_condition(cond)
        shape = (len(labels), self.num_heads, self.num_tokens - self.sizes[-1], self.width // self.num_heads)
        dtype = autocast_dtype(cond.device) or cond.dtype
        stores = (self.calls.stores(name, [shape] * self.depth, cond, dtype) for name in ("keys", "values"))
        caches = list(zip(*stores, strict=True))
        modulations = [block.modulation(block_cond) for block in self._blocks()]
        constants = [(bias.to(dtype), scale) for bias, scale in (block.attn.constants() for block in self._blocks())]
        context = Context(cond[:, None], positions, modulations, self.head_nm.modulation(cond), constants, caches)
        return replace(context, **self.calls.hold("context", context.fixed()))

    def next_logits(self, context: Context, following: Tensor | None = None) -> Tensor:
        """Raw logits [B, p_i^2, V] of the context's next scale i.

        following: the map [b, C, p_i, p_i] that scale i starts from; where b < B, the B sequences share it in turn.
        None at the first scale. No mask: a scale reads itself and everything before.
        """
        scale, start = context.scale, context.length
        reads = [x for x in tree_leaves((context.fixed(), context.caches)) if x is not None]
        logits = self.calls.run(("scale", scale), partial(self._logits, context, scale, start), following, reads=reads)
        context.scale, context.length = scale + 1, start + self.sizes[scale]
        return logits

    def _logits(self, context: Context, scale: int, start: int, following: Tensor | None) -> Tensor:
        l = self.sizes[scale]
        with torch.autocast(context.positions.device.type, enabled=False):
            positions = context.positions[:, start : start + l]
            if following is None:
                x = context.start_token + self.pos_start + positions
            else:
                x = self.word_embed(following.float().flatten(2).transpose(1, 2)) + positions
                x = x.repeat(len(context.start_token) // len(x), 1, 1)
        of_blocks = zip(self.blocks, context.modulations, context.caches, context.constants, strict=True)
        for block, modulation, cache, constants in of_blocks:
            x = block(x, modulation=modulation, cache=cache, start=start, constants=constants)
        return self.logits(x, context.head_modulation)

    def draw_drop_path(self, batch: int, generator: torch.Generator) -> Tensor:
        """`drop_path_keep` of a step: independent draws for each image and branch."""
        rates = torch.tensor([b.drop_path for b in self._blocks() if b.drop_path > 0], device=generator.device)
        uniform = torch.rand(2 * len(rates), batch, generator=generator, device=generator.device)
        return (uniform >= rates.repeat_interleave(2)[:, None]).float()

    # A new network

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, adaln: float = 0.5, gamma: float = 1e-5) -> VAR:
        """The published initialisation: std sqrt(1 / 3D), small head, near-zero gates. For networks trained here."""
        std = math.sqrt(1 / self.width / 3)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_mul_1H11"):
                parameter.fill_(math.log(4.0))
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                scale = math.sqrt(1 / self.width) if name.endswith("ada_gss") else std
                parameter.normal_(0, scale, generator=generator)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].get_parameter("weight").mul_(adaln)
        for block in self._blocks():
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            if hasattr(block, "ada_gss"):
                gates, rest = block.ada_gss[:, :, :2], block.ada_gss[:, :, 2:]
            else:
                gates, rest = block.ada_lin[1].get_parameter("weight").tensor_split([2 * self.width])
            gates.mul_(gamma)
            rest.mul_(adaln)
        return self
