"""IMM sampling written down plainly from its definition, straight on the tensors of a state dict: the oracle of the
tests.

One image-condition pair at a time through the embeddings, two network calls per guided step, attention spelt out.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F


def linear(state, name, x):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def time_embedding(state, name, time):
    """[B] -> [B, D]."""
    frequencies = torch.tensor([math.exp(-math.log(10000.0) * k / 128) for k in range(128)], dtype=torch.float64)
    angles = time.double()[:, None] * frequencies
    x = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    return linear(state, name + ".mlp.2", F.silu(linear(state, name + ".mlp.0", x)))


def modulated(x, shift, scale):
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def attention(state, name, x, heads):
    B, L, D = x.shape
    q, k, v = linear(state, name + ".qkv", x).view(B, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(D // heads)).softmax(dim=-1)
    return linear(state, name + ".proj", (weights @ v).transpose(1, 2).reshape(B, L, D))


def dit(state, x, t, s, labels, *, heads, patch):
    """F(x, t, s, labels) of a DiT; t and s [B], labels int64 [B], the last row of the table being no class."""
    B, C, side, _ = x.shape
    grid = side // patch
    tokens = x.view(B, C, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(B, grid * grid, -1)
    weight = state["x_embedder.proj.weight"].flatten(1)
    x = tokens @ weight.T + state["x_embedder.proj.bias"] + state["pos_embed"]
    c = time_embedding(state, "t_embedder", t) + time_embedding(state, "s_embedder", s)
    c = c + state["y_embedder.embedding_table.weight"][labels]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        block = f"blocks.{i}"
        parts = linear(state, f"{block}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        x = x + parts[2][:, None] * attention(state, f"{block}.attn", modulated(x, *parts[:2]), heads)
        h = linear(state, f"{block}.mlp.fc1", modulated(x, *parts[3:5]))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + parts[5][:, None] * linear(state, f"{block}.mlp.fc2", h)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    x = linear(state, "final_layer.linear", modulated(x, shift, scale))
    return x.view(B, grid, grid, patch, patch, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, side, side)


@torch.no_grad()
def sample(state, latents, labels, num_steps, cfg, *, heads, patch, T=0.994, eps=0.0, sigma_data=0.5, scale=1000.0):
    """Pushforward on the uniform grid, for flow matching with the stride embedding."""
    x, B = latents, len(latents)
    nobody = torch.full([B], state["y_embedder.embedding_table.weight"].shape[0] - 1)
    times = [T + (eps - T) * i / num_steps for i in range(num_steps + 1)]
    for t, s in pairwise(times):
        c_in = 1 / (sigma_data * math.sqrt((1 - t) ** 2 + t**2))
        time, stride = torch.full([B], t * scale), torch.full([B], (t - s) * scale)
        unconditional = dit(state, c_in * x, time, stride, nobody, heads=heads, patch=patch)
        conditional = dit(state, c_in * x, time, stride, labels, heads=heads, patch=patch)
        x = x - (t - s) * sigma_data * (unconditional + cfg * (conditional - unconditional))
    return x
