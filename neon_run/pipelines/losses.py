"""The training loss of a pipeline's network, as its scheduler wants it.

x_t = signal x + noise e with e standard normal. Wanted is e (epsilon; Ho et al. 2020), x (sample), signal e - noise x
(v_prediction; Salimans and Ho 2022), or e - x (flow: Lipman et al. 2023 with signal = 1 - noise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neon_run.pipelines.kinds import FLOW, Opened

DROPPED = 0.1  # of the prompts, as text-to-image networks were trained, so that guidance keeps its meaning


@dataclass(frozen=True)
class Noising:
    """The T times of a scheduler: shares of image and noise, and what the network is given as time, each [T]."""

    signal: Tensor
    noise: Tensor
    time: Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any) -> Noising:
        if type(scheduler).__name__ == FLOW:
            fresh = type(scheduler).from_config(scheduler.config)  # of all T times, which a sampler replaces by its own
            noise = fresh.sigmas[: len(fresh.timesteps)].cpu()
            return cls(1 - noise, noise, fresh.timesteps.cpu(), "flow")
        part = scheduler.alphas_cumprod.cpu()  # of the variance, that is the image's
        return cls(part.sqrt(), (1 - part).sqrt(), torch.arange(len(part)), scheduler.config.prediction_type)

    def drawn(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its time [B], drawn evenly, and what is wanted of the network; x [B, ...]."""
        e = torch.randn(x.shape, generator=generator, device=x.device)
        index = torch.randint(len(self.time), [len(x)], generator=generator, device=x.device)
        signal, noise = (level.to(x.device)[index].view(-1, *[1] * (x.ndim - 1)) for level in (self.signal, self.noise))
        match self.prediction:
            case "epsilon":
                wanted = e
            case "sample":
                wanted = x
            case "v_prediction":
                wanted = signal * e - noise * x
            case "flow":
                wanted = e - x
            case other:
                raise AssertionError(other)  # `open_pipeline` lets no other pass
        return signal * x + noise * e, self.time.to(x.device)[index], wanted


def pipeline_loss(
    net: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    *,
    opened: Opened,
    noising: Noising,
    prompts: tuple[str, ...] = (),
) -> Tensor:
    """Mean square error of what is predicted, a scalar. `images`: uint8 [B, C, H, W]; `labels`: [B], classes or places
    in `prompts`. A DiT drops labels by itself; what it predicts of the variance is left out, as in its sampler."""
    x = images.float() / 127.5 - 1
    if "vae" in opened.kind.parts:
        vae = opened.pipeline.vae
        with torch.no_grad():
            x = vae.encode(x).latent_dist.sample(generator) * vae.config.scaling_factor
    x_t, time, wanted = noising.drawn(x, generator)
    predicted = net(x_t, time, **_condition(opened, labels, generator, prompts)).sample
    return (predicted[:, : x.shape[1]] - wanted).square().mean()


def _condition(
    opened: Opened, labels: Tensor | None, generator: torch.Generator, prompts: tuple[str, ...]
) -> dict[str, Tensor]:
    """The network's arguments that say what the images are of."""
    if labels is None:
        return {}
    if opened.kind.condition == "classes":
        return {"class_labels": labels}
    dropped = torch.rand(len(labels), generator=generator, device=labels.device) < DROPPED
    texts = ["" if drop else prompts[label] for label, drop in zip(labels.tolist(), dropped.tolist(), strict=True)]
    with torch.no_grad():
        return {"encoder_hidden_states": opened.pipeline.encode_prompt(texts, labels.device, 1, False)[0]}
