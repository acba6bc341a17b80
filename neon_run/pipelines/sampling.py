"""A pipeline's own images: what its users see, each from a generator of its own seed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neon_run.pipelines.kinds import Opened


@dataclass(frozen=True)
class Sampling:
    """The sampler's settings; None: the pipeline's own. `prompts`: what labels are places in, of text-to-image."""

    scheduler: Any
    steps: int | None = None
    guidance: float | None = None
    prompts: tuple[str, ...] = ()


def pipeline_images(
    net: nn.Module, seeds: list[int], labels: Tensor | None, *, opened: Opened, sampling: Sampling
) -> Tensor:
    """uint8 [B, C, H, W]: the pipeline's images with `net`."""
    pipeline, kind = opened.pipeline, opened.kind
    device = next(net.parameters()).device
    pipeline.register_modules(**{kind.network: net, "scheduler": sampling.scheduler})
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    if not kind.condition and type(sampling.scheduler).__name__ == "EulerDiscreteScheduler":
        made = _euler(opened, net, generators, sampling)
    else:
        given: dict[str, Any] = {"generator": generators, "output_type": "np"}
        given |= {"num_inference_steps": sampling.steps} if sampling.steps else {}
        given |= {"guidance_scale": sampling.guidance} if sampling.guidance is not None else {}
        places = [] if labels is None else labels.tolist()
        match kind.condition:
            case "classes":
                made = pipeline(places, **given).images
            case "prompts":
                made = pipeline([sampling.prompts[place] for place in places], **given).images
            case _:
                made = pipeline(len(seeds), **given).images
    images = torch.as_tensor(made).to(device)  # [B, H, W, C] in [0, 1]
    return images.mul(255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _euler(opened: Opened, net: Any, generators: list[torch.Generator], sampling: Sampling) -> Tensor:
    """[B, H, W, C]: a DDPMPipeline with Euler's scheduler, whose own call leaves out that this one begins at noise of
    its largest level and scales the network's inputs."""
    config, scheduler = net.config, sampling.scheduler
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    own = inspect.signature(type(opened.pipeline).__call__).parameters["num_inference_steps"].default
    device = generators[0].device
    scheduler.set_timesteps(sampling.steps or own, device=device)
    start = [torch.randn(config.in_channels, *size, generator=generator, device=device) for generator in generators]
    x = torch.stack(start) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        predicted = net(scheduler.scale_model_input(x, time), time).sample
        x = scheduler.step(predicted, time, x, generator=generators).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
