"""The stochastic and the deterministic sampler of EDM: Karras et al. 2022, algorithms 1 and 2, beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from neon_core.pixels import check_finite
from neon_files.errors import UserError


class Denoiser(Protocol):
    """D(x; sigma) with the range of noise levels that it knows."""

    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor: ...

    def round_sigma(self, sigma: Tensor) -> Tensor: ...


def time_steps(
    net: Denoiser,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """t_0 > ... > t_{N-1} > t_N = 0, float64 [N + 1] (equation 5), within the range of `net` and on its levels.

    Raises UserError for fewer than two steps, which equation 5 cannot place.
    """
    if num_steps < 2:
        raise UserError(f"--num_steps {num_steps}: the sampler needs at least 2 steps")
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    i = torch.arange(num_steps, dtype=torch.float64, device=device)
    t = (high ** (1 / rho) + i / (num_steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    t = net.round_sigma(t)
    return torch.cat([t, torch.zeros_like(t[:1])])


def edm_sampler(
    net: Denoiser,
    latents: Tensor,
    class_labels: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """Images, float64 [B, C, R, R], about [-1, 1] but not clipped, from unit normal `latents` [B, C, R, R].

    class_labels: one-hot [B, K] or None. `noise` gives the next float64 [B, C, R, R] of unit normal numbers; it is
    asked once in every step, in the range [S_min, S_max] or not, so that the images of a seed do not depend on that
    range; never if S_churn is 0. The state is float64, the network computes in its own precision.
    Calls the network 2 num_steps - 1 times. Raises UserError if num_steps < 2.
    """
    if S_churn > 0 and noise is None:
        raise ValueError("S_churn above 0 needs `noise`")
    t = time_steps(net, num_steps, sigma_min, sigma_max, rho, latents.device)
    churned = ((t[:-1] >= S_min) & (t[:-1] <= S_max)).to(torch.float64)
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1) * churned
    t_hat = net.round_sigma(t[:-1] + gamma * t[:-1]) if S_churn > 0 else t[:-1]

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - net(x, sigma, class_labels).to(torch.float64)) / sigma  # dx/dt, equation 3

    x_next = latents.to(torch.float64) * t[0]
    for i in range(num_steps):
        # A little more noise: from level t_i up to t^_i.
        x_hat = x_next
        if S_churn > 0 and noise is not None:
            x_hat = x_next + (t_hat[i] ** 2 - t[i] ** 2).sqrt() * S_noise * noise()
        # Euler step from t^_i to t_{i+1}.
        d = slope(x_hat, t_hat[i])
        x_next = x_hat + (t[i + 1] - t_hat[i]) * d
        # Heun's correction, except onto t = 0.
        if i < num_steps - 1:
            d_prime = slope(x_next, t[i + 1])
            x_next = x_hat + (t[i + 1] - t_hat[i]) * (d / 2 + d_prime / 2)
    return x_next


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8: 127.5 x + 128, clamped to 0 .. 255 and truncated, as in every published figure.

    Raises NotFiniteImages.
    """
    return (check_finite(images) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
