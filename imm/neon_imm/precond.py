"""The moment matching model around its network: noise schedules, f(x, t, s), guidance (Zhou, Ermon, Song 2025, IMM).

Times run from eps (data) to T (noise), x_t = alpha_t y + sigma_t noise, and the model maps a sample at t to one at s.
"nt" is the noise-to-signal ratio sigma_t / alpha_t. Shapes: B batch, C channels, h w grid or pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from neon_core.precision import product_layers, weights_as
from neon_files.errors import UserError
from neon_imm import songunet
from neon_imm.dit import DIT_MODELS, DiT
from neon_run.replay import Calls

F_TYPES = ("identity", "simple_edm", "euler_fm")  # how f(x, t, s) is made from the raw output
TEMB_TYPES = ("identity", "stride")  # the second time input: s, or t - s
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class FlowMatching:
    """alpha = 1 - t, sigma = t."""

    @staticmethod
    def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    @staticmethod
    def logsnr(t: Tensor) -> Tensor:
        return 2 * (torch.log(1 - t) - torch.log(t))

    @staticmethod
    def logsnr_prime(t: Tensor) -> Tensor:
        return -2 / ((1 - t) * t)

    @staticmethod
    def nt_to_t(nt: Tensor) -> Tensor:
        return torch.nan_to_num(nt / (1 + nt), nan=1.0)  # inf / inf


class VPCosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    @staticmethod
    def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))

    @staticmethod
    def logsnr(t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(t * (math.pi / 2)))

    @staticmethod
    def logsnr_prime(t: Tensor) -> Tensor:
        return -math.pi / (torch.sin(t * (math.pi / 2)) * torch.cos(t * (math.pi / 2)))

    @staticmethod
    def nt_to_t(nt: Tensor) -> Tensor:
        return torch.arctan(nt) / (math.pi / 2)


SCHEDULES: dict[str, type[FlowMatching] | type[VPCosine]] = {"fm": FlowMatching, "vp_cosine": VPCosine}


class NoiseSchedule:
    """One of SCHEDULES with the ends of its time interval. All functions keep the dtype of their argument."""

    def __init__(self, name: str = "fm", eps: float = 0.0, T: float = 0.994):
        if name not in SCHEDULES:
            raise UserError(f"noise_schedule {name!r}: known are {', '.join(SCHEDULES)}")
        self.formulas = SCHEDULES[name]
        self.name, self.eps, self.T = name, float(eps), float(T)
        self.nt_low, self.nt_high = (
            self.nt(torch.tensor(t, dtype=torch.float64, device="cpu")).item() for t in (eps, T)
        )

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.formulas.alpha_sigma(t)

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), computed in float64."""
        return self.formulas.logsnr(t.double()).to(t.dtype)

    def logsnr_prime(self, t: Tensor) -> Tensor:
        """d logsnr / dt."""
        return self.formulas.logsnr_prime(t)

    def log_nt(self, t: Tensor) -> Tensor:
        return -self.logsnr(t) / 2

    def nt(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t."""
        return self.log_nt(t).exp()

    def nt_to_t(self, nt: Tensor) -> Tensor:
        """The inverse of `nt`, computed in float64."""
        return self.formulas.nt_to_t(nt.double()).to(nt.dtype)


def build_inner(model_type: str, **kwargs) -> nn.Module:
    """The network named in a published configuration: SongUNet, DiT, or DiT_<size>_<patch>."""
    if model_type == "SongUNet":
        return songunet.SongUNet(**kwargs)
    if model_type == "DiT":
        return DiT(**kwargs)
    if model_type in DIT_MODELS:
        return DiT(**{**kwargs, **DIT_MODELS[model_type]})
    raise UserError(f"model_type {model_type!r}: known are SongUNet, DiT, {', '.join(DIT_MODELS)}")


class IMMPrecond(nn.Module):
    """f(x, t, s, labels): the sample at s that belongs to the sample x at t. Its network is `model`.

    x is [B, C, h, w]; t and s are one number for the batch, or one per sample in any shape of B elements. Labels are
    one-hot rows [B, K] or one row [1, K]; an all-zero row, or None, is unconditional.
    """

    calls = Calls()

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        mixed_precision: str | None = None,
        noise_schedule: str = "fm",
        model_type: str = "SongUNet",
        sigma_data: float = 0.5,
        f_type: str = "euler_fm",
        T: float = 0.994,
        eps: float = 0.0,
        temb_type: str = "identity",
        time_scale: float = 1000.0,
        **model_kwargs,
    ):
        super().__init__()
        if f_type not in F_TYPES:
            raise UserError(f"f_type {f_type!r}: known are {', '.join(F_TYPES)}")
        if temb_type not in TEMB_TYPES:
            raise UserError(f"temb_type {temb_type!r}: known are {', '.join(TEMB_TYPES)}")
        if f_type == "euler_fm" and noise_schedule != "fm":
            raise UserError(f"f_type euler_fm is defined for noise_schedule fm, not for {noise_schedule!r}")
        if mixed_precision not in (None, *PRECISIONS):
            raise UserError(f"mixed_precision {mixed_precision!r}: known are None, {', '.join(PRECISIONS)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.mixed_precision = mixed_precision
        self.schedule = NoiseSchedule(noise_schedule, eps, T)
        self.sigma_data, self.f_type, self.temb_type, self.time_scale = sigma_data, f_type, temb_type, time_scale
        self.model = build_inner(
            model_type, img_resolution=img_resolution, img_channels=img_channels, in_channels=img_channels,
            out_channels=img_channels, label_dim=label_dim, **model_kwargs,
        )  # fmt: skip

    # The network and its inputs.

    @contextmanager
    def running(self, training: bool, mixed_precision: str | None) -> Iterator[None]:
        """Train or eval mode and the network's precision inside the block; as before after it."""
        before = self.training, self.mixed_precision
        self.train(training)
        self.mixed_precision = mixed_precision
        try:
            yield
        finally:
            self.train(before[0])
            self.mixed_precision = before[1]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, every weight is held in the precision that it is used in: for many calls without a gradient."""
        products = [*product_layers(self.model), *(m for m in self.model.modules() if isinstance(m, songunet.Conv))]
        embeddings = [m for m in self.model.modules() if isinstance(m, songunet.Linear)]
        half = weights_as(PRECISIONS.get(self.mixed_precision or ""), products, self.calls.hold)
        with half, weights_as(torch.float64 if embeddings else None, embeddings, self.calls.hold):
            yield

    def autocast(self, device: torch.device, force_fp32: bool = False) -> AbstractContextManager:
        """The precision of the network, whatever autocast region the caller is in."""
        dtype = PRECISIONS.get(self.mixed_precision or "")
        enabled = dtype is not None and not force_fp32
        return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)

    def network(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, force_fp32: bool, **kwargs) -> Tensor:
        """Raw output F of the network [B, C, h, w], in its own precision."""
        x, t, s = x.float(), t.float().reshape(-1, 1, 1, 1), s.float().reshape(-1, 1, 1, 1)
        alpha, sigma = self.schedule.alpha_sigma(t)
        c_in = (alpha**2 + sigma**2) ** -0.5 / self.sigma_data
        second = (t - s if self.temb_type == "stride" else s) * self.time_scale
        with self.autocast(x.device, force_fp32):
            model = partial(self.model, **kwargs)  # tensors among them come in training only
            return self.calls.run("model", model, c_in * x, (t * self.time_scale).flatten(), second.flatten(), labels)

    def label_rows(self, class_labels: Tensor | None, device: torch.device) -> Tensor | None:
        """float32 [B or 1, K], or None where the model knows no classes."""
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros(1, self.label_dim, device=device)
        return class_labels.to(device, torch.float32).reshape(-1, self.label_dim)

    # f, from F.

    def step(self, x: Tensor, t: Tensor, s: Tensor, F: Tensor) -> Tensor:
        """f(x, t, s) from the raw output F."""
        if self.f_type == "euler_fm":
            return x - (t - s) * self.sigma_data * F
        if self.f_type == "identity":
            return self.ddim(x, F, t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule.alpha_sigma(t), self.schedule.alpha_sigma(s)
        norm = alpha_t**2 + sigma_t**2
        c_skip = (alpha_t * alpha_s + sigma_t * sigma_s) / norm
        c_out = -(alpha_s * sigma_t - alpha_t * sigma_s) * norm**-0.5 * self.sigma_data
        return c_skip * x + c_out * F

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False, **kwargs
    ) -> Tensor:
        """f(x, t, s, labels) [B, C, h, w] in the widest dtype of x and t. kwargs (augment_labels) go to the network."""
        labels = self.label_rows(class_labels, x.device)
        t, s = t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
        F = self.network(x, t, s, labels, force_fp32, **kwargs).to(t.dtype)
        return self.step(x, t, s, F)

    def cfg_forward(
        self, x: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None = None, cfg_scale: float | None = None
    ) -> Tensor:
        """f with F = F_u + cfg_scale (F_c - F_u), both halves in one pass. None: no guidance, one pass of B rows.

        Raises UserError for guidance without labels. A scale of 1 or 0 still costs two halves.
        """
        if cfg_scale is None:
            return self(x, t, s, class_labels)
        one_hot = self.label_rows(class_labels, x.device)
        if one_hot is None or class_labels is None:
            raise UserError(
                f"cfg {cfg_scale} needs class labels, and "
                + ("this model knows no classes" if self.label_dim == 0 else "none were given")
                + ": leave cfg out"
            )
        labels = one_hot.expand(len(x), -1)
        t, s = t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
        both_t, both_s = (u if u.numel() == 1 else torch.cat([u, u]) for u in (t, s))
        rows = torch.cat([torch.zeros_like(labels), labels])  # [2B, K], the unconditional half first
        F_u, F_c = self.network(torch.cat([x, x]), both_t, both_s, rows, False).to(t.dtype).chunk(2)
        return self.step(x, t, s, F_u + cfg_scale * (F_c - F_u))

    # Moving between noise levels.

    def add_noise(self, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean y at time t; `noise` has the standard deviation sigma_data."""
        alpha, sigma = self.schedule.alpha_sigma(t.reshape(-1, 1, 1, 1))
        return alpha * y + sigma * noise

    def ddim(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at t moved to s along the line through the clean y: DDIM without noise."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (self.schedule.alpha_sigma(u.reshape(-1, 1, 1, 1)) for u in (t, s))
        return (alpha_s - alpha_t * sigma_s / sigma_t) * y + sigma_s / sigma_t * x


def build_network(config: dict, **overrides) -> IMMPrecond:
    """The network of {"class": "IMMPrecond", "kwargs": ...}, as checkpoints record it, with fresh weights.

    The recorded precision is that of the training and does not carry over. Raises UserError for other classes, or for
    arguments that do not make a network.
    """
    if config["class"] != "IMMPrecond":
        raise UserError(f"the checkpoint holds a network of class {config['class']!r}; IMM's are of class 'IMMPrecond'")
    try:
        return IMMPrecond(**{**config["kwargs"], "mixed_precision": None, **overrides})
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's network configuration cannot be built: {error}") from error
