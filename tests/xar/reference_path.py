"""The sampler written as plainly as its description, on the weights of a product network: for tests and benchmarks.

Both guidance halves always run, the condition is computed for every row and repeated for every token, keys and values
are concatenated anew in every call, attention is written out.
"""

import torch
from torch import Tensor

from neon_xar.flow import sde_times
from neon_xar.xar import CELLS, NULL_CLASS, XAR, Block, from_cells


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return x * cos + turned * sin


class PlainBlock:
    """One block with its growing list of keys and values."""

    def __init__(self, block: Block):
        self.block, self.k, self.v = block, None, None
        self.cell_tokens = len(block.attn.rope.freqs_cos) // CELLS

    def __call__(self, x: Tensor, condition: Tensor, first: int, write: bool, mask: Tensor | None) -> Tensor:
        block, attn = self.block, self.block.attn
        B, L, D = x.shape
        slots = block.ada_lin(condition).view(-1, B, 6, D)  # cell by cell
        slots = slots.repeat_interleave(self.cell_tokens, dim=0).transpose(0, 1)  # [B, L, 6, D]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = slots.unbind(2)
        h = rms(x) * (1 + scale1) + shift1
        q, k, v = attn.qkv(h).view(B, L, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = attn.rope.freqs_cos[first : first + L], attn.rope.freqs_sin[first : first + L]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        if write:
            self.k, self.v = k[:, :, : -self.cell_tokens], v[:, :, : -self.cell_tokens]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, D)
        x = x + gamma1 * attn.proj(h)
        h = rms(x) * (1 + scale2) + shift2
        mlp = block.mlp
        return x + gamma2 * mlp.fc2(torch.nn.functional.gelu(mlp.fc1_g(h)) * mlp.fc1_x(h))


class PlainNet:
    def __init__(self, net: XAR):
        self.net = net
        self.encoder = [PlainBlock(block) for block in net.encoder_blocks]
        self.decoder = [PlainBlock(block) for block in net.decoder_blocks]

    def __call__(self, z: Tensor, labels: Tensor, k: Tensor, cell: int, write: bool) -> Tensor:
        """z [B, T or 2T, C], labels [B], integer times k [B or 2B], cell by cell."""
        net, L = self.net, z.shape[1]
        end = net.cell_tokens * (cell + 1)
        first = end - L
        mask = net.mask[:, :, first:end, :end] if write else None
        condition = net.class_emb(labels).repeat(L // net.cell_tokens, 1) + net.time_embed(k)
        x = rms(net.z_proj(z) + net.encoder_pos_embed_learned[:, first:end], net.z_proj_ln.weight)
        for block in self.encoder:
            x = block(x, condition, first, write, mask)
        x = net.decoder_embed(rms(x, net.encoder_norm.weight)) + net.decoder_pos_embed_learned[:, first:end]
        for block in self.decoder:
            x = block(x, condition, first, write, mask)
        return net.pred(rms(x, net.decoder_norm.weight))[:, -net.cell_tokens :]


@torch.no_grad()
def sample_latents_plainly(net: XAR, labels: Tensor, num_steps: int, cfg: float, draw) -> Tensor:
    """As `neon_xar.sampler.sample_latents`."""
    plain, B = PlainNet(net), len(labels)
    labels = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    times = sde_times(num_steps)
    done: list[Tensor] = []
    for cell in range(CELLS):
        g = 1 + (cfg - 1) * cell / 3
        x = draw(net.cell_tokens, net.channels, dtype=torch.float32).double()
        for i in range(num_steps):
            t, dt = times[i], times[i + 1] - times[i]
            eps = draw(net.cell_tokens, net.channels, dtype=torch.float64) if i < num_steps - 1 else None
            z = torch.cat([x, x]).float()
            k = (t.float() * 1000).long().repeat(2 * B)
            if i == 0 and cell > 0:
                z = torch.cat([torch.cat([done[-1], done[-1]]), z], dim=1)
                k = torch.cat([torch.zeros_like(k), k])
            v = plain(z, labels, k, cell, write=i == 0).double()
            both = torch.cat([x, x])
            drift = v - t * (-(both + (1 - t) * v) / t)
            conditional, unconditional = drift.chunk(2)
            d = unconditional + g * (conditional - unconditional) if g > 1 else conditional
            x = x + d * dt
            if eps is not None:
                x = x + (2 * t).sqrt() * dt.abs().sqrt() * eps
        done.append(x.float())
    return from_cells(torch.cat(done, dim=1))
