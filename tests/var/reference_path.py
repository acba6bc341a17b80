"""VAR sampling written down plainly from its definition, straight on the tensors of a state dict: the oracle of the
tests.

Nothing is saved for later but keys and values, which grow by concatenation: every scale projects the class condition
anew, embeds both halves of the doubled batch, adds up its positions, and masks explicitly.
"""

import math

import torch
import torch.nn.functional as F

from neon_var.quantizer import phi_index


def _linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _norm(x, width):
    return F.layer_norm(x, (width,), eps=1e-6)


def _attention(x, state, name, heads, past, mask):
    B, l, D = x.shape
    qkv = x @ state[f"{name}.mat_qkv.weight"].T
    qkv = qkv + torch.cat((state[f"{name}.q_bias"], torch.zeros(D), state[f"{name}.v_bias"]))
    q, k, v = qkv.view(B, l, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    scale = 0.25 / math.sqrt(D // heads)
    if f"{name}.scale_mul_1H11" in state:
        q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        q = q * torch.minimum(state[f"{name}.scale_mul_1H11"], torch.tensor(math.log(100))).exp()
        scale = 1.0
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    scores = q @ k.transpose(-1, -2) * scale + mask
    out = scores.softmax(dim=-1) @ v
    return _linear(out.transpose(1, 2).reshape(B, l, D), state, f"{name}.proj"), (k, v)


def _transformer(x, cond, state, heads, depth, past, mask):
    D = x.shape[-1]
    for i in range(depth):
        if f"blocks.{i}.ada_gss" in state:
            six = _linear(F.silu(cond), state, "shared_ada_lin.1").view(-1, 1, 6, D) + state[f"blocks.{i}.ada_gss"]
        else:
            six = _linear(F.silu(cond), state, f"blocks.{i}.ada_lin.1").view(-1, 1, 6, D)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        y, past[i] = _attention(_norm(x, D) * (1 + scale1) + shift1, state, f"blocks.{i}.attn", heads, past[i], mask)
        x = x + gamma1 * y
        y = F.gelu(_linear(_norm(x, D) * (1 + scale2) + shift2, state, f"blocks.{i}.ffn.fc1"), approximate="tanh")
        x = x + gamma2 * _linear(y, state, f"blocks.{i}.ffn.fc2")
    scale, shift = _linear(F.silu(cond), state, "head_nm.ada_lin.1").view(-1, 1, 2, D).unbind(2)
    return _linear(_norm(x, D) * (1 + scale) + shift, state, "head")


def _filter(logits, top_k, top_p):
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    if top_p:
        ordered, order = logits.sort(dim=-1)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)
    return logits


@torch.no_grad()
def sample_tokens(state, vae_state, patch_nums, heads, depth, labels, draw, cfg, top_k=0, top_p=0.0):
    """(tokens [B, L], f_hat [B, C, P, P]); `draw` makes tokens [B, l] out of probabilities [B, l, V]."""
    codes = vae_state["quantize.embedding.weight"]
    B, S, P, C = len(labels), len(patch_nums), patch_nums[-1], codes.shape[1]
    none = state["class_emb.weight"].shape[0] - 1
    cond = state["class_emb.weight"][torch.cat((labels, torch.full_like(labels, none)))]
    f_hat, following, past, chosen, start = torch.zeros(B, C, P, P), None, [None] * depth, [], 0
    num_phi = sum(name.startswith("quantize.quant_resi.qresi_ls.") for name in vae_state) // 2
    for i, p in enumerate(patch_nums):
        l = p * p
        if i == 0:
            x = cond[:, None].expand(-1, l, -1) + state["pos_start"]
        else:
            x = _linear(following.flatten(2).transpose(1, 2).repeat(2, 1, 1), state, "word_embed")
        x = x + (state["lvl_embed.weight"][state["lvl_1L"]] + state["pos_1LC"])[:, start : start + l]
        mask = state["attn_bias_for_masking"][:, :, start : start + l, : start + l]
        raw = _transformer(x, cond, state, heads, depth, past, mask)
        start += l
        t = cfg * i / (S - 1)
        tokens = draw(_filter((1 + t) * raw[:B] - t * raw[B:], top_k, top_p).softmax(dim=-1))
        h = codes[tokens].transpose(1, 2).reshape(B, C, p, p)
        if i < S - 1:
            h = F.interpolate(h, size=(P, P), mode="bicubic")
        conv = f"quantize.quant_resi.qresi_ls.{phi_index(i, S, num_phi)}"
        h = 0.5 * h + 0.5 * F.conv2d(h, vae_state[f"{conv}.weight"], vae_state[f"{conv}.bias"], padding=1)
        f_hat = f_hat + h
        following = F.interpolate(f_hat, size=(patch_nums[i + 1],) * 2, mode="area") if i < S - 1 else None
        chosen.append(tokens)
    return torch.cat(chosen, dim=1), f_hat
