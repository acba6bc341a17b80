"""Next-scale sampling with guidance: one token map per scale, coarse to fine, keys and values cached.

Shapes: B images, l = p_i^2 tokens of scale i, V codes, C code width, P side of the feature map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neon_core.pixels import check_finite
from neon_core.precision import autocast_dtype, frozen_in, product_layers, weights_as
from neon_core.seeds import PerImageRandom
from neon_var.quantizer import MultiScaleQuantizer
from neon_var.var import VAR
from neon_var.vqvae import VQVAE


class TokenNoise(Protocol):
    """Where a sampling call's randomness comes from."""

    def draw(self, probabilities: Tensor) -> Tensor:
        """Tokens int64 [B, l], one from each row of [B, l, V]."""
        ...

    def exponential(self, like: Tensor) -> Tensor:
        """Exp(1) of the shape [B, l, V] and dtype of `like`."""
        ...


class PerImageNoise:
    """Each image draws from the generator of its own seed, whatever its neighbours are."""

    def __init__(self, random: PerImageRandom):
        self.random = random

    def draw(self, probabilities: Tensor) -> Tensor:
        noise = self.exponential(probabilities).clamp_min_(torch.finfo(torch.float32).tiny)
        return (probabilities / noise).argmax(dim=-1)  # the race of exponentials: a draw from each row

    def exponential(self, like: Tensor) -> Tensor:
        return self.random.exponential(*like.shape[1:])


class BatchNoise:
    """One generator for the whole batch, through torch.multinomial, as the official sampler."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def draw(self, probabilities: Tensor) -> Tensor:
        return multinomial(probabilities, self.generator)[..., 0]

    def exponential(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).exponential_(generator=self.generator)


def multinomial(probabilities: Tensor, generator: torch.Generator, num_samples: int = 1) -> Tensor:
    """int64 [B, l, |num_samples|] from [B, l, V], without replacement where num_samples is negative."""
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    drawn = torch.multinomial(rows, abs(num_samples), replacement=num_samples >= 0, generator=generator)
    return drawn.view(*probabilities.shape[:-1], -1)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits [..., V] with -inf outside the `top_k` largest and outside the smallest set of mass `top_p`; 0: off.

    Ties at the k-th largest all stay. In ascending order, what has a cumulative probability <= 1 - top_p goes, but
    never the last one.
    """
    candidates = None  # (values, places in V), ascending
    if top_k > 0:
        values, order = logits.topk(min(top_k + 1, logits.shape[-1]) if top_p > 0 else top_k, dim=-1)
        kth = values[..., top_k - 1 : top_k]
        # On a GPU the answer would have to be waited for, and sorting all costs less.
        tied = top_p > 0 and values.shape[-1] > top_k and (logits.is_cuda or bool((values[..., top_k:] == kth).any()))
        if top_p > 0 and not tied:  # the sorted survivors are at hand: far fewer than V
            candidates = values[..., :top_k].flip(-1), order[..., :top_k].flip(-1)
        else:
            logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = candidates or logits.sort(dim=-1)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        remove[..., -1] = False
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, order, ascending.masked_fill_(remove, -torch.inf))
    return logits


def gumbel_codes(filtered: Tensor, exponential: Tensor, ratio: float, codes: Tensor) -> Tensor:
    """[B, l, C] soft code vectors (`more_smooth`): a Gumbel softmax that sharpens with the scale, ratio = i/(S-1)."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -exponential.log()
    return ((filtered * (1 + ratio) + gumbel) / temperature).softmax(dim=-1) @ codes


@dataclass
class ScaleResult:
    """One scale of a sampling call."""

    raw_logits: Tensor  # [2B, l, V], conditional rows first
    guided_logits: Tensor  # [B, l, V]
    filtered_logits: Tensor  # [B, l, V]
    tokens: Tensor  # int64 [B, l]
    f_hat: Tensor  # [B, C, P, P], all scales so far
    following: Tensor  # [B, C, p, p], what the next scale starts from


def sample_scales(
    var: VAR,
    quantizer: MultiScaleQuantizer,
    labels: Tensor,
    noise: TokenNoise,
    *,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    temperature: float = 1.0,
) -> Iterator[ScaleResult]:
    """The scales of images of classes `labels` [B], one after the other.

    Guidance grows linearly from none at the first scale to `cfg` at the last: (1 + t) conditional - t unconditional.
    `temperature` divides these logits before they are filtered.
    """
    B, S = len(labels), len(var.patch_nums)
    context = var.begin(torch.cat((labels, torch.full_like(labels, var.num_classes))))
    side = var.patch_nums[-1]
    f_hat, following = torch.zeros(B, var.Cvae, side, side, device=labels.device), None
    for i, p in enumerate(var.patch_nums):
        ratio = i / max(S - 1, 1)
        raw = var.next_logits(context, following)  # [2B, l, V]
        t = cfg * ratio
        guided = (1 + t) * raw[:B] - t * raw[B:]
        filtered = filter_logits(guided if temperature == 1 else guided / temperature, top_k, top_p)
        tokens = noise.draw(filtered.softmax(dim=-1))
        if more_smooth:
            h = gumbel_codes(filtered, noise.exponential(filtered), ratio, quantizer.embedding.weight)
            h = h.transpose(1, 2).reshape(B, var.Cvae, p, p)
        else:
            h = quantizer.maps(tokens)
        f_hat, following = quantizer.add_scale(i, f_hat, h)
        yield ScaleResult(raw, guided, filtered, tokens, f_hat, following)


@torch.no_grad()
def sample_tokens(var: VAR, vae: VQVAE, labels: Tensor, noise: TokenNoise, **settings) -> tuple[Tensor, Tensor]:
    """(tokens int64 [B, L] of all scales, their feature map [B, C, P, P])."""
    tokens: list[Tensor] = []
    dtype = autocast_dtype(labels.device)
    with (
        weights_as(dtype, var.autocast_layers(), var.calls.hold),
        weights_as(dtype, product_layers(vae.quantize)),
    ):
        for result in sample_scales(var, vae.quantize, labels, noise, **settings):
            tokens, f_hat = [*tokens, result.tokens], result.f_hat
            del result  # before the next scale needs the memory
    return torch.cat(tokens, dim=1), f_hat


@torch.no_grad()
def decode_images(vae: VQVAE, f_hat: Tensor, precision: str, batch: int | None = None) -> Tensor:
    """Images in [0, 1] of feature maps [B, C, P, P], in that precision (see `frozen_in`), `batch` at a time."""
    with frozen_in(f_hat.device, precision, vae):
        return torch.cat([(vae.decode(part) + 1) * 0.5 for part in f_hat.split(batch or len(f_hat))])


def to_uint8(images: Tensor, rounding: str = "truncate") -> Tensor:
    """uint8 of images in [0, 1]. "truncate" as the official scripts (in float16 the product is rounded to float16
    first), which is half a level darker than "nearest". Raises NotFiniteImages."""
    levels = check_finite(images).clamp(0, 1) * 255
    if rounding == "nearest":
        levels = levels.round()
    elif rounding != "truncate":
        raise ValueError(f"rounding {rounding!r} is neither truncate nor nearest")
    return levels.to(torch.uint8)
