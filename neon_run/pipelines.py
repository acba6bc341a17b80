"""`neon improve PIPELINE`: `improve` for a diffusers pipeline of an unconditional UNet2DModel.

The pipeline's own call makes the images, so S is what its users see; the training loss follows from the scheduler's
noise schedule and `prediction_type` (Ho et al. 2020; v: Salimans and Ho 2022). diffusers is the extra of that name.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from neon_core.distributed import barrier, is_main, print0, session
from neon_files.checkpoint import load_strict, read_checkpoint
from neon_files.errors import UserError, one_line
from neon_run import flags as f
from neon_run.improvement import Result, improve

PIPELINES, SCHEDULERS = ("DDPMPipeline", "DDIMPipeline"), ("DDPMScheduler", "DDIMScheduler")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def open_pipeline(source: str, device: torch.device) -> Any:
    """The pipeline of a folder or hub name, on `device`; no pickle is read. UserError for kinds that are not known."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "neon improve: needs the package diffusers; install it with `pip install 'neon-reference[diffusers]'`"
        ) from error
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # of many kinds: no such folder, no network, only pickles
        raise UserError(f"{source}: cannot be opened as a diffusers pipeline ({one_line(error)})") from error
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    known = kinds.get("unet") == "UNet2DModel" and kinds.get("scheduler") in SCHEDULERS and len(kinds) == 2
    if type(pipeline).__name__ not in PIPELINES or not known:
        parts = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UserError(
            f"{source}: is a {type(pipeline).__name__} ({parts}); known are {' and '.join(PIPELINES)} of a UNet2DModel "
            f"with {' or '.join(SCHEDULERS)}; call neon_run.improve for others"
        )
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    if unet.class_embed_type or unet.num_class_embeds:
        raise UserError(f"{source}: its network wants classes, which a {type(pipeline).__name__} does not give")
    if unet.in_channels != unet.out_channels or "learned" in str(scheduler.get("variance_type")):
        raise UserError(f"{source}: its network also predicts a variance, whose loss is not known here")
    if scheduler.prediction_type not in PREDICTIONS:
        raise UserError(f"{source}: predicts {scheduler.prediction_type}; known are {', '.join(PREDICTIONS)}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipeline_images(
    net: nn.Module, seeds: list[int], labels: Tensor | None, *, pipeline: Any, scheduler: Any, steps: int | None
) -> Tensor:
    """uint8 [B, C, H, W]: the pipeline's images with `net`, each from a generator of its own seed; `steps`: None for
    the pipeline's own number."""
    device = next(net.parameters()).device
    pipeline.register_modules(unet=net, scheduler=scheduler)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    options = {} if steps is None else {"num_inference_steps": steps}
    made = pipeline(len(seeds), generator=generators, output_type="np", **options).images
    return torch.from_numpy(made).to(device).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def pipeline_loss(
    net: nn.Module, images: Tensor, labels: Tensor | None, generator: torch.Generator, *, scheduler: Any
) -> Tensor:
    """Mean square error of what the scheduler wants predicted, at times drawn evenly; images are uint8."""
    x = images.float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    signal = scheduler.alphas_cumprod.to(x.device)  # [T]: part of the variance that is the image's
    time = torch.randint(len(signal), [len(x)], generator=generator, device=x.device)
    part = signal[time][:, None, None, None]
    noisy = part.sqrt() * x + (1 - part).sqrt() * noise
    targets = {"epsilon": noise, "sample": x, "v_prediction": part.sqrt() * noise - (1 - part).sqrt() * x}
    return (net(noisy, time).sample - targets[scheduler.config.prediction_type]).square().mean()


def improve_pipeline(source: str, out: Path, steps: int | None, device: str, **options: Any) -> Result:
    """Improve the UNet2DModel of PIPELINE, a folder or hub name, by Neon; the same command goes on after a kill.

    OUT/pipeline is the pipeline with the better network, which from_pretrained opens; where Neon is not shown to be
    better there is none.
    """
    with session(device) as where:
        pipeline = open_pipeline(source, where)
        net, scheduler = pipeline.unet.requires_grad_(True), pipeline.scheduler
        sample = partial(pipeline_images, pipeline=pipeline, scheduler=scheduler, steps=steps)
        loss = partial(pipeline_loss, scheduler=scheduler)
        given = {name: value for name, value in options.items() if value is not None}
        result = improve(net, sample=sample, loss=loss, out=out, device=where.type, **given)
        if result.improved:
            load_strict(net, read_checkpoint(result.checkpoint))
            pipeline.register_modules(unet=net)
            if is_main():
                _write(pipeline, result, source, out / "pipeline")
            barrier()
            print0(f"{out / 'pipeline'}")
        return result


def _write(pipeline: Any, result: Result, source: str, folder: Path) -> None:
    """The pipeline's folder with a card, under its name only when whole."""
    temporary = folder.with_name(".pipeline-unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.unet.eval()
    pipeline.save_pretrained(temporary, safe_serialization=True)
    card = (
        f"---\nlibrary_name: diffusers\ntags: [neon]\n---\n\nThe network of {source}, improved by Neon "
        f"(arXiv 2510.03597) at w = {result.w:.4g}: {result.details['distance']} {result.base:.4g} -> "
        f"{result.neon:.4g} on fresh seeds.\n"
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


improve_command = click.Command(
    "improve",
    params=[
        click.Argument(["source"], metavar="PIPELINE"),
        f.flag("--real", required=True, metavar="PATH", help="Real images, folder or .zip, or statistics, .npz."),
        f.flag("--out", "out", type=f.FOLDER, required=True, help="Folder of the run; the same one continues it."),
        f.flag("--steps", type=f.COUNT, help="Of the sampler.  [default: the pipeline's]"),
        f.DETECTOR,
        f.flag("--num_synthetic", type=f.TWO_OR_MORE, help="|S|.  [default here and below: of neon_run.improve]"),
        f.flag("--distance", type=f.POSITIVE, help="Of the fine-tune, relative to the norm of the weights."),
        f.flag("--lr", type=f.POSITIVE, help="Learning rate of the fine-tune."),
        f.flag("--batch_size", type=f.COUNT, help="Images per step of the fine-tune."),
        f.flag("--micro_batch_size", type=f.COUNT, help="Images per forward pass of the fine-tune."),
        f.flag("--sample_batch_size", type=f.COUNT, help="Images sampled at once."),
        f.flag("--ranking_images", type=f.TWO_OR_MORE, help="Of each w of the search."),
        f.flag("--images", type=f.TWO_OR_MORE, help="Of the decision."),
        f.flag("--controls/--no_controls", default=True, help="Self-training, a random direction, other w."),
        f.flag("--seed", type=click.IntRange(0), default=0, help="Of the fine-tune."),
        f.DEVICE,
    ],
    callback=improve_pipeline,
    help=improve_pipeline.__doc__,
)  # fmt: skip
