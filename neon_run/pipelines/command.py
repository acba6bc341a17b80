"""`neon improve PIPELINE`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from neon_core.distributed import barrier, is_main, print0, session
from neon_files.errors import UserError
from neon_run import flags as f
from neon_run.improvement import Result, improve
from neon_run.pipelines.kinds import Opened, open_pipeline
from neon_run.pipelines.losses import Noising, pipeline_loss
from neon_run.pipelines.results import write_result
from neon_run.pipelines.sampling import Sampling, pipeline_images

RANK = 8  # of the LoRA
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Chosen:
    """What is said of the sampler and of the trained weights; None: not said."""

    steps: int | None = None
    guidance: float | None = None
    prompts: Path | None = None
    full: bool = False  # all weights of a text-to-image network in place of a LoRA
    rank: int | None = None

    def check(self, source: str, opened: Opened) -> None:
        """UserError for what this pipeline has not, and for prompts that are missing."""
        condition = opened.kind.condition
        other = {
            "--guidance": self.guidance is not None and not condition,
            "--prompts": self.prompts is not None and condition != "prompts",
            "--full": self.full and condition != "prompts",
            "--rank": self.rank is not None and condition != "prompts",
        }
        for flag in (name for name, wrong in other.items() if wrong):
            raise UserError(f"{flag}: {source} is a {type(opened.pipeline).__name__}, which has none; leave it out")
        if condition == "prompts" and self.prompts is None:
            raise UserError(f"--prompts: {source} makes images of texts; name a file with one prompt per line")
        if self.full and self.rank is not None:
            raise UserError("--rank: is of a LoRA, and --full trains all weights; leave one of them out")


def improve_pipeline(
    source: str, out: Path, device: str = "auto", chosen: Chosen | None = None, **options: Any
) -> Result:
    """`options` are those of `improve`."""
    chosen = chosen or Chosen()
    with session(device) as where:
        opened = open_pipeline(source, where)
        chosen.check(source, opened)
        prompts = read_prompts(chosen.prompts) if chosen.prompts else ()
        scheduler, network = opened.pipeline.scheduler, opened.network
        classes = {"": 0, "classes": 1000, "prompts": len(prompts)}[opened.kind.condition]
        adapter = opened.kind.condition == "prompts" and not chosen.full
        if adapter:
            add_lora(network, chosen.rank or RANK)
        else:
            network.requires_grad_(True)
        sampling = Sampling(scheduler, chosen.steps, chosen.guidance, prompts)
        sample = partial(pipeline_images, opened=opened, sampling=sampling)
        loss = partial(pipeline_loss, opened=opened, noising=Noising.of(scheduler), prompts=prompts)
        result = improve(network, sample=sample, loss=loss, out=out, num_classes=classes, device=where.type, **options)
        if result.improved:
            opened.pipeline.register_modules(**{opened.kind.network: network})
            if is_main():
                write_result(opened, result, source, out, adapter)
            barrier()
            print0(f"{out / ('adapter' if adapter else 'pipeline')}")
        return result


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 file that are not empty. UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as a text in UTF-8 ({error})") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt; write one per line")
    return prompts


def add_lora(network: Any, rank: int) -> None:
    """A fresh LoRA on the attention of a diffusers network, the same in every call; all else is frozen."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            "neon improve: a LoRA needs the package peft; install it with `pip install 'neon-reference[diffusers]'`, "
            "or train all weights with --full"
        ) from error
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))


def improve_callback(source: str, out: Path, device: str, **given: Any) -> None:
    """Improve the network of PIPELINE, a folder or hub name, by Neon; the same command goes on after a kill.

    Unconditional pipelines of a UNet2DModel, class-conditional ones of a DiT, and with --prompts text-to-image ones of
    Stable Diffusion. OUT/pipeline is the pipeline with the better network, which from_pretrained opens; of
    text-to-image, without --full, OUT/adapter is a LoRA for load_lora_weights. Where Neon is not shown to be better
    there is neither.
    """
    chosen = Chosen(**{name: given.pop(name) for name in ("steps", "guidance", "prompts", "full", "rank")})
    improve_pipeline(source, out, device, chosen, **{name: v for name, v in given.items() if v is not None})


improve_command = click.Command(
    "improve",
    params=[
        click.Argument(["source"], metavar="PIPELINE"),
        f.flag("--real", required=True, metavar="PATH", help="Real images, folder or .zip, or statistics, .npz."),
        f.flag("--out", "out", type=f.FOLDER, required=True, help="Folder of the run; the same one continues it."),
        f.flag("--steps", type=f.COUNT, help="Of the sampler.  [default: the pipeline's]"),
        f.flag("--guidance", type=click.FloatRange(0), help="Scale of the guidance.  [default: the pipeline's]"),
        f.flag("--prompts", type=f.FILE, help="One text per line, for text-to-image; images take them in turn."),
        f.flag("--full", is_flag=True, help="Text-to-image: train all weights, not a LoRA."),
        f.flag("--rank", type=f.COUNT, help=f"Of the LoRA.  [default: {RANK}]"),
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
    callback=improve_callback,
    help=improve_callback.__doc__,
)  # fmt: skip
