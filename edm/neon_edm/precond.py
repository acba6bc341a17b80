"""Preconditioners: what turns a raw U-Net F into a denoiser D (Karras et al. 2022, section 5 and table 1).

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

Each class below is one column of table 1. All scalings are float32, whatever the dtype of x and sigma: the published
networks were trained that way, and the tables of VP and iDDPM depend on it.
Shapes: B batch, C channels, R resolution, K classes.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neon_core.precision import PRECISIONS, weights_as
from neon_edm.layers import Conv2d, GroupNorm
from neon_edm.networks import DhariwalUNet, SongUNet
from neon_edm.perceptron import PixelPerceptron
from neon_run.replay import Calls

UNETS: dict[str, type[nn.Module]] = {c.__name__: c for c in (SongUNet, DhariwalUNet, PixelPerceptron)}


class Precond(nn.Module, ABC):
    """The parts that the four share. Subclasses give the scalings, the range of sigma and its rounding."""

    sigma_min: float
    sigma_max: float
    calls = Calls()

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        out_channels: int | None = None,
        **unet_kwargs: Any,
    ):
        super().__init__()
        if model_type not in UNETS:
            raise ValueError(f"model_type {model_type!r} is not one of {', '.join(UNETS)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16 = use_fp16
        self.precision = "auto"  # of the U-Net: see `unet_dtype`
        self.model = UNETS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels if out_channels is None else out_channels,
            label_dim=label_dim,
            **unet_kwargs,
        )

    def unet_dtype(self, device: torch.device, precision: str | None = None) -> torch.dtype:
        """Of the U-Net's activations: `precision` (None: its own), one of PRECISIONS; "auto", as in the original:
        float16 for a `use_fp16` network on CUDA, else float32."""
        precision = precision or self.precision
        if precision != "auto":
            return PRECISIONS[precision]
        return torch.float16 if self.use_fp16 and device.type == "cuda" else torch.float32

    @contextmanager
    def frozen(self, device: torch.device, precision: str = "auto") -> Iterator[None]:
        """Inside, the U-Net has this precision, and its weights are held in it: for many calls without a gradient.
        The embedding is float32 in half precision too."""
        before, self.precision = self.precision, precision
        dtype = self.unet_dtype(device)
        layers = [m for m in self.model.modules() if isinstance(m, (Conv2d, GroupNorm))]
        try:
            with weights_as(None if dtype == torch.float32 else dtype, layers, self.calls.hold):
                yield
        finally:
            self.precision = before

    @abstractmethod
    def scalings(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float, Tensor]:
        """c_skip, c_out, c_in, c_noise of float32 `sigma` [B, 1, 1, 1] or [1, 1, 1, 1]."""

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The noise level nearest to `sigma` that the network knows."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        **unet_kwargs: Any,
    ) -> Tensor:
        """The denoised image D(x; sigma), float32 [B, C, R, R].

        sigma: one level or [B]. class_labels: rows [B, K] or [K]; None stands for a row of zeros. The U-Net computes
        in `unet_dtype`, or in float32 with `force_fp32`. `augment_labels` passes through to the U-Net.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        dtype = torch.float32 if force_fp32 else self.unet_dtype(x.device)

        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        F_in = (c_in * x).to(dtype)
        unet = partial(self.model, **unet_kwargs)  # tensors among them come in training only
        F_x = self.calls.run("unet", unet, F_in, c_noise.flatten(), class_labels)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)


class EDMPrecond(Precond):
    """Karras et al. 2022, section 5: unit-variance input and target at every noise level."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **unet_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **unet_kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        return c_skip, c_out, c_in, sigma.log() / 4


class VPPrecond(Precond):
    """Variance preserving SDE (Song et al. 2021) as column VP of table 1."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **unet_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **unet_kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        on_cpu: dict[str, Any] = {
            "dtype": torch.float32,
            "device": "cpu",
        }  # also where the network itself is built on the meta device
        self.sigma_min = float(self.sigma(torch.tensor(epsilon_t, **on_cpu)))
        self.sigma_max = float(self.sigma(torch.tensor(1.0, **on_cpu)))

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t), float32. exp and then minus 1: the coarse steps near 0 are those of the published networks."""
        return vp_sigma(t, self.beta_d, self.beta_min)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """t(sigma)."""
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return (root - self.beta_min) / self.beta_d

    def scalings(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


def vp_sigma(t: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    return ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt()


class VEPrecond(Precond):
    """Variance exploding SDE (Song et al. 2021) as column VE of table 1."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **unet_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **unet_kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scalings(self, sigma: Tensor) -> tuple[float, Tensor, float, Tensor]:
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol and Dhariwal 2021) as column iDDPM of table 1: M noise levels, kept in the buffer `u`.

    The U-Net has twice the output channels, of which the second half (a variance) is not used.
    """

    u: Tensor  # [M + 1], falling from sigma_max to u[M] = 0

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **unet_kwargs: Any,
    ):
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, out_channels=2 * img_channels, **unet_kwargs
        )
        self.C_1, self.C_2, self.M = C_1, C_2, M
        table = iddpm_table(M, C_1, C_2)
        self.register_buffer("u", torch.from_numpy(table))
        self.sigma_min, self.sigma_max = float(table[M - 1]), float(table[0])

    def sigma_index(self, sigma: float | Tensor) -> Tensor:
        """Index of the nearest entry of the table, the first where two are equally near; int64 of sigma's shape."""
        sigma = torch.as_tensor(sigma, device=self.u.device)
        distance = (sigma.to(torch.float32).reshape(-1, 1) - self.u).abs()  # [B, M + 1]
        return distance.argmin(dim=1).reshape(sigma.shape)

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The nearest entry of the table, in the dtype, shape and on the device of `sigma`."""
        sigma = torch.as_tensor(sigma)
        return self.u[self.sigma_index(sigma)].to(device=sigma.device, dtype=sigma.dtype)

    def scalings(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        c_noise = self.M - 1 - self.sigma_index(sigma).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


def iddpm_table(M: int, C_1: float, C_2: float) -> np.ndarray:
    """u, float32 [M + 1]: u_M = 0, u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1).

    Every entry follows from the one already rounded to float32, as in the published networks; in float64 the levels
    of M = 1000 would be off by up to 5e-4.
    """
    j = torch.arange(M + 1, dtype=torch.float32, device="cpu")
    abar = torch.sin(0.5 * math.pi * j / M / (C_2 + 1)).square().numpy()
    one, floor = np.float32(1), np.float32(C_1)
    u = np.zeros(M + 1, dtype=np.float32)
    for k in range(M, 0, -1):
        u[k - 1] = np.sqrt((u[k] * u[k] + one) / max(abar[k - 1] / abar[k], floor) - one)
    return u


PRECONDITIONERS: dict[str, type[Precond]] = {c.__name__: c for c in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}


def named_arguments(class_name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments by name, of which old files give some by position.

    Raises ValueError on an unknown class, TypeError where the arguments do not fit.
    """
    bound = inspect.signature(preconditioner(class_name)).bind(*args, **kwargs)
    named = dict(bound.arguments)
    return named | named.pop("unet_kwargs", {})


def preconditioner(class_name: str) -> type[Precond]:
    """The class of that name. Raises ValueError."""
    if class_name not in PRECONDITIONERS:
        raise ValueError(f"{class_name} is not one of {', '.join(PRECONDITIONERS)}")
    return PRECONDITIONERS[class_name]


def build_network(class_name: str, kwargs: dict[str, Any]) -> Precond:
    """A fresh network. Raises ValueError on an unknown class or type, TypeError on unknown arguments."""
    return preconditioner(class_name)(**kwargs)
