"""The pipelines that `neon improve` knows, by the names of their classes, and how one is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neon_files.errors import UserError, one_line

ODE = ("DDIMScheduler", "DPMSolverMultistepScheduler")  # whose steps draw no noise, or draw it from the generators
LATENT = ("DDPMScheduler", *ODE, "PNDMScheduler", "EulerDiscreteScheduler")
FLOW = "FlowMatchEulerDiscreteScheduler"
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Kind:
    """What a pipeline is made of. `parts`: component -> classes that it may have; "" where it may be absent."""

    pipelines: tuple[str, ...]
    schedulers: tuple[str, ...]
    network: str  # the component that Neon trains
    parts: Mapping[str, tuple[str, ...]]
    condition: str = ""  # what an image is of: "", "classes" or "prompts"

    def __str__(self) -> str:
        return f"{' and '.join(self.pipelines)} of a {self.parts[self.network][0]} with {', '.join(self.schedulers)}"


KINDS = (
    Kind(
        ("DDPMPipeline",), ("DDPMScheduler", *ODE, "EulerDiscreteScheduler", FLOW), "unet", {"unet": ("UNet2DModel",)}
    ),
    Kind(("DDIMPipeline",), ("DDIMScheduler", "DDPMScheduler"), "unet", {"unet": ("UNet2DModel",)}),
    Kind(
        ("DiTPipeline",),
        ODE,
        "transformer",
        {"transformer": ("DiTTransformer2DModel",), "vae": ("AutoencoderKL",)},
        "classes",
    ),
    Kind(
        ("StableDiffusionPipeline",),
        LATENT,
        "unet",
        {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "safety_checker": ("", "StableDiffusionSafetyChecker"),
            "feature_extractor": ("", "CLIPImageProcessor", "CLIPFeatureExtractor"),
            "image_encoder": ("",),
        },
        "prompts",
    ),
)


@dataclass(frozen=True)
class Opened:
    """A pipeline on its device, in float32, with the folder that it came from."""

    kind: Kind
    pipeline: Any
    folder: Path

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, self.kind.network)


def open_pipeline(source: str, device: torch.device) -> Opened:
    """That of a folder or hub name; no pickle is read. UserError, before any weights are read or fetched, for kinds
    that are not known."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "neon improve: needs the package diffusers; install it with `pip install 'neon-reference[diffusers]'`"
        ) from error
    try:
        index = diffusers.DiffusionPipeline.load_config(source)
        kind = _kind(source, index)
        folder = source if Path(source).is_dir() else diffusers.DiffusionPipeline.download(source, use_safetensors=True)
        left_out = {"safety_checker": None} if "safety_checker" in kind.parts else {}  # a black image is no sample
        pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, use_safetensors=True, **left_out)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such folder, no network, only pickles, a missing package
        raise UserError(f"{source}: cannot be opened as a diffusers pipeline ({one_line(error)})") from error
    _check_settings(source, kind, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()  # a text encoder comes in the type of its file
    return Opened(kind, pipeline.to(device), Path(folder))


def _kind(source: str, index: Mapping[str, Any]) -> Kind:
    """Of a model_index.json. UserError where no kind has just these parts."""
    classes = {name: str(part[1] or "") for name, part in index.items() if isinstance(part, list | tuple)}
    name, scheduler = index.get("_class_name", "pipeline"), classes.pop("scheduler", "")
    for kind in KINDS:
        allowed = all(classes.get(part, "") in known for part, known in kind.parts.items())
        if name in kind.pipelines and scheduler in kind.schedulers and allowed and classes.keys() <= kind.parts.keys():
            return kind
    parts = ", ".join(f"{part} {given}" for part, given in {"scheduler": scheduler, **classes}.items() if given)
    raise UserError(
        f"{source}: is a {name} ({parts}); known are {'; '.join(map(str, KINDS))}; call neon_run.improve for others"
    )


def _check_settings(source: str, kind: Kind, pipeline: Any) -> None:
    """UserError for settings under which the sampler or the loss would be another one."""
    net, scheduler = getattr(pipeline, kind.network).config, pipeline.scheduler.config
    if not kind.condition and (net.class_embed_type or net.num_class_embeds):
        raise UserError(f"{source}: its network wants classes, which a {type(pipeline).__name__} does not give")
    if kind.condition == "prompts" and (net.class_embed_type or net.addition_embed_type or net.encoder_hid_dim):
        raise UserError(f"{source}: its network wants more than the text of a {type(pipeline).__name__}")
    if kind.condition == "classes" and net.num_embeds_ada_norm != 1000:
        raise UserError(f"{source}: its network has {net.num_embeds_ada_norm} classes; a DiTPipeline is for 1000")
    outputs = (net.in_channels, 2 * net.in_channels) if kind.condition == "classes" else (net.in_channels,)
    if net.out_channels not in outputs or "learned" in str(scheduler.get("variance_type")):
        raise UserError(f"{source}: its network also predicts a variance, whose loss is not known here")
    if type(pipeline.scheduler).__name__ == FLOW:
        others = [name for name in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling") if scheduler[name]]
    else:
        others = [name for name in ("use_flow_sigmas",) if scheduler.get(name)]
        others += ["timestep_type"] if scheduler.get("timestep_type") == "continuous" else []
        known = PREDICTIONS[:2] if type(pipeline.scheduler).__name__ == "PNDMScheduler" else PREDICTIONS
        if scheduler.prediction_type not in known:
            raise UserError(f"{source}: predicts {scheduler.prediction_type}; known are {', '.join(known)}")
    if others:
        raise UserError(f"{source}: its scheduler sets {', '.join(others)}, whose loss is not known here")
