"""The training loss of VAR, its progressive stages, and which parameters are decayed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Besides biases and vectors, parameters whose names contain one of these are never decayed.
UNDECAYED = (
    "cls_token", "start_token", "task_token", "cfg_uncond", "pos_embed", "pos_1LC", "pos_start", "start_pos",
    "lvl_embed", "gamma", "beta", "ada_gss", "moe_bias", "scale_mul",
)  # fmt: skip


def token_loss(
    logits: Tensor, tokens: Tensor, num_tokens: int, newest: tuple[int, float] | None = None, label_smoothing: float = 0
) -> Tensor:
    """mean_b sum_l CE_{b,l} / L of logits [B, l, V] and tokens [B, l]; L = `num_tokens` counts all scales.

    newest = (n, weight): the last n tokens belong to a stage that is being warmed up.
    """
    ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=label_smoothing, reduction="none")
    ce = ce.view(tokens.shape) / num_tokens
    if newest is not None:
        n, weight = newest
        ce = torch.cat((ce[:, :-n], ce[:, -n:] * weight), dim=1)
    return ce.sum(dim=1).mean()


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups: matrices with decay; vectors, biases and position-like tables without."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() <= 1 or name.endswith("bias") or any(part in name for part in UNDECAYED)
            (rest if free else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
