"""The moment matching loss: a kernel distance between f(x_t, t -> s) and f(x_r, r -> s), r a little below t.

Zhou, Ermon, Song 2025 (IMM). Groups of `matrix_size` consecutive samples share their times; every group has one loss.
Shapes: B batch, G groups, M samples in each, D = C h w. Times and losses are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neon_files.errors import UserError
from neon_imm.precond import IMMPrecond, NoiseSchedule


def normal_cdf(x: float | Tensor, mean: float, std: float) -> Tensor:
    """Normal cumulative distribution in float64."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return (1 + torch.erf((x - mean) / (std * math.sqrt(2)))) / 2


def normal_icdf(p: Tensor, mean: float, std: float) -> Tensor:
    """The inverse of `normal_cdf`."""
    return mean + std * math.sqrt(2) * torch.erfinv(2 * p.double() - 1)


@dataclass(frozen=True)
class IMMLoss:
    """The settings of the loss. The defaults are the class defaults of the release; rows are in rows.py."""

    matrix_size: int = 4  # M
    sigma: float = 1.0  # width of the kernel
    sample_t_mode: str = "lognormal"  # lognormal | uniform
    a: float = 2.0  # outer weight: alpha_t^a
    b: float = 4.0  # outer weight: sigmoid(b - logsnr)
    k: float = 12.0  # nt(t) - nt(r) = (nt_high - nt_low) / 2^k
    label_dropout: float = 0.1
    min_tr_gap: float | None = None  # at least this much between t and r
    P_mean: float = -1.1  # lognormal times
    P_std: float = 2.0

    def __post_init__(self):
        if self.sample_t_mode not in ("lognormal", "uniform"):
            raise UserError(f"sample_t_mode {self.sample_t_mode!r}: known are lognormal, uniform")

    def sample_times(self, schedule: NoiseSchedule, u_t: Tensor, u_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t >= r >= s, float64 in the shape of the uniforms u_t and u_s."""
        low, high = schedule.nt_low, schedule.nt_high
        if self.sample_t_mode == "uniform":
            first, last = (schedule.nt_to_t(torch.tensor(nt, dtype=torch.float64)).item() for nt in (low, high))
            t = u_t.double() * (last - first) + first
            nt = schedule.nt(t)
            ns = schedule.nt(u_s.double() * (schedule.nt_to_t(nt) - first) + first)
        else:
            floor = max(low, 1e-8)
            # As released: the lower end of log nt is `floor` itself, not its logarithm. So nt >= exp(floor).
            nt = self._truncated_lognormal(u_t, floor, math.log(high))
            ns = self._truncated_lognormal(u_s, math.log(floor), nt.log())
            t = schedule.nt_to_t(nt)
        ns = torch.minimum(ns, nt).clamp(min=low)
        s = schedule.nt_to_t(ns)
        nr = (nt - (high - low) * 2.0**-self.k).clamp(low, high)
        r = schedule.nt_to_t(nr)
        if self.min_tr_gap is not None:
            # As released: nt_low, a ratio, serves as the smallest time here.
            r = torch.minimum(r, (t - self.min_tr_gap).clamp(min=low))
        return t, torch.maximum(r, s).clamp(min=schedule.eps), s

    def _truncated_lognormal(self, u: Tensor, log_low: float, log_high: float | Tensor) -> Tensor:
        """exp of a normal variable between the two ends, by its inverse distribution function at u."""
        below, above = (normal_cdf(end, self.P_mean, self.P_std) for end in (log_low, log_high))
        return normal_icdf(u.double() * (above - below) + below, self.P_mean, self.P_std).exp()

    def kernel_weight(self, net: IMMPrecond, t: Tensor, s: Tensor) -> Tensor:
        """w(t, s): makes the kernel independent of the step's length."""
        if net.f_type == "euler_fm":
            return 1 / (t - s).abs() / net.sigma_data
        (alpha_t, sigma_t), (alpha_s, sigma_s) = net.schedule.alpha_sigma(t), net.schedule.alpha_sigma(s)
        distance = alpha_s * sigma_t - alpha_t * sigma_s
        if net.f_type == "simple_edm":
            return torch.sqrt(alpha_t**2 + sigma_t**2) / distance.abs() / net.sigma_data
        return (sigma_t / distance).abs()

    def outer_weight(self, net: IMMPrecond, t: Tensor) -> Tensor:
        """wout(t)."""
        alpha, sigma = net.schedule.alpha_sigma(t)
        slope = -0.5 * net.schedule.logsnr_prime(t)
        return alpha**self.a / (alpha**2 + sigma**2) * slope * torch.sigmoid(self.b - net.schedule.logsnr(t))

    def kernel_mean(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """[G]: mean over all pairs of exp(-w |x_i - y_j| / D / sigma); x and y are [G, M, ...], w is [G].

        The distance is not squared; its square is kept from 0, where the root has no gradient.
        """
        x, y = x.flatten(2), y.flatten(2)  # [G, M, D]
        squared = (x[:, :, None] - y[:, None]).square().sum(dim=-1)  # [G, M, M]
        distance = squared.clamp(min=1e-8).sqrt()
        return torch.exp(-w[:, None, None] * distance / x.shape[-1] / self.sigma).mean(dim=(1, 2))

    def moment_distance(self, f_st: Tensor, f_sr: Tensor, w: Tensor, wout: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[G], and the three kernel means: wout (mean K(st, st) + mean K(sr, sr) - 2 mean K(st, sr))."""
        sims = {
            "inter_sample_sim": self.kernel_mean(f_st, f_st, w),
            "inter_gt_sim": self.kernel_mean(f_sr, f_sr, w),
            "cross_sim": self.kernel_mean(f_st, f_sr, w),
        }
        distance = wout * (sims["inter_sample_sim"] + sims["inter_gt_sim"] - 2 * sims["cross_sim"])
        return distance, {name: value.detach() for name, value in sims.items()}

    @staticmethod
    def without_nan(loss: Tensor) -> Tensor:
        """`loss`, or where any entry is NaN the whole of it with finite numbers (NaN -> 0, infinities -> the largest).

        The gradient stays NaN all the same: such a step is for the gradient scaler to skip.
        """
        return torch.nan_to_num(loss) if loss.isnan().any() else loss

    def from_draws(
        self,
        net: IMMPrecond,
        images: Tensor,
        labels: Tensor | None,
        *,
        u_t: Tensor,
        u_s: Tensor,
        noise: Tensor,
        u_drop: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each group [G] for given random numbers, and what is worth logging.

        images [B, C, h, w] clean (and augmented), labels one-hot [B, K] or None; u_t, u_s [G] and u_drop [B] uniform,
        noise [B, C, h, w] standard normal. The teacher is the network itself, as it is now and in the same mode, with
        the labels before dropout and with the student's dropout masks.
        """
        B, M = len(images), self.matrix_size
        if B % M:
            raise UserError(f"micro batch of {B} images: must be a multiple of matrix_size {M}")
        t, r, s = self.sample_times(net.schedule, u_t.flatten(), u_s.flatten())  # [G]
        logs = {"r_t_ratio": r / t, "s_t_ratio": s / t, "t_r_diff": t - r, "ts": t}
        w, wout = self.kernel_weight(net, t, s), self.outer_weight(net, t)
        t, r, s = (u.repeat_interleave(M)[:, None, None, None] for u in (t, r, s))  # [B, 1, 1, 1]

        kept = labels
        if labels is not None and u_drop is not None:
            kept = labels * (u_drop >= self.label_dropout).to(labels)[:, None]
        extra = {} if augment_labels is None else {"augment_labels": augment_labels}
        noise = noise * net.sigma_data
        masks = _default_generator_state(images.device)
        f_st = net(net.add_noise(images, t, noise), t, s, kept, **extra)
        with torch.no_grad():
            _restore_default_generator(images.device, masks)
            f_sr = net(net.add_noise(images, r, noise), r, s, labels, force_fp32=True, **extra)
        groups = (B // M, M)
        loss, sims = self.moment_distance(f_st.unflatten(0, groups), f_sr.unflatten(0, groups), w, wout)
        logs.update(sims, loss=loss.detach())
        return self.without_nan(loss), logs

    def __call__(
        self,
        net: IMMPrecond,
        images: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`from_draws` with random numbers from `generator`, in the order t, s, label dropout, noise."""
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        dtype = torch.float64 if self.sample_t_mode == "uniform" else torch.float32
        groups = len(images) // self.matrix_size
        u_t, u_s = (torch.rand(groups, dtype=dtype, **where).to(images.device) for _ in range(2))
        u_drop = None if labels is None else torch.rand(len(images), **where).to(images.device)
        noise = torch.randn(images.shape, **where).to(images.device)
        return self.from_draws(net, images, labels, u_t=u_t, u_s=u_s, noise=noise, u_drop=u_drop)


def _default_generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_default_generator(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
