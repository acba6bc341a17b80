"""xAR behind the contract: transformer, frozen autoencoder, guidance, labels and pixel rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.kl_vae import AutoencoderKL, to_ldm_names, weights_digest
from neon_core.precision import autocast, check_precision, half_on_gpu
from neon_core.seeds import PerImageRandom
from neon_files.checkpoint import Checkpoint, load_strict, read_checkpoint
from neon_files.errors import UserError
from neon_run.compiling import compile_network
from neon_xar.flow import MIN_STEPS
from neon_xar.loss import draw_randomness, velocity_loss
from neon_xar.official import official_labels
from neon_xar.sampler import sample_latents
from neon_xar.vae import ROUNDINGS, SCALE, both_moments, center_crop, decode, scaled_latent
from neon_xar.xar import SIZES, XAR, build

DEFAULT_VAE = Path(__file__).resolve().parents[1] / "pretrained" / "kl16.ckpt"
LABEL_RULES = ("balanced", "official")
M = TypeVar("M", bound=nn.Module)


class XARBackbone(Backbone):
    """`autoencoder`: an AutoencoderKL, or in a subclass another module with its `embed_dim` and `stride`. `vae_name`
    identifies the weights of prepared moments, for `prepared_key` only.

    `flip`: the fine-tune sees every image mirrored half of the time, as officially.
    """

    def __init__(self, net: XAR, autoencoder: Any, vae_name: str = "kl16", flip: bool = True):
        if (autoencoder.embed_dim, autoencoder.stride * net.grid) != (net.channels, net.img_size):
            raise UserError(
                f"the autoencoder has {autoencoder.embed_dim} latent channels and stride {autoencoder.stride}, the "
                f"transformer requires {net.channels} and {net.img_size // net.grid}; give its --vae_path"
            )
        self.net, self.autoencoder = net, autoencoder.eval().requires_grad_(False)
        self.img_size, self.num_classes, self.flip = net.img_size, net.class_num, flip
        self.prepared_key = f"moments-{vae_name}-{net.img_size}"

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device,
        *,
        vae_path: str | Path = DEFAULT_VAE,
        model: str | None = None,
        compiled: bool = False,
        flip: bool = True,
        entry: str | None = None,
    ) -> XARBackbone:
        """Weights of `checkpoint` beside the autoencoder of `vae_path`, in eval mode. Raises UserError.

        The size is the checkpoint's configuration where it has one (files that Neon wrote), else `model`.
        """
        net = load_net(checkpoint, device, model, compiled=compiled, entry=entry)
        return cls(net, *load_autoencoder(vae_path, device), flip)

    @classmethod
    def frozen_files(cls, checkpoint: Path, *, vae_path: Path = DEFAULT_VAE, **options: Any) -> dict[str, Path]:
        return {"vae_path": vae_path}

    @classmethod
    def check_settings(
        cls,
        *,
        cfg: float = 1.0,
        flow_steps: int = MIN_STEPS,
        precision: str = "auto",
        decoder_precision: str = "auto",
        rounding: str = "truncate",
        label_rule: str = "balanced",
        **settings: Any,
    ) -> None:
        if flow_steps < MIN_STEPS:
            raise UserError(f"--flow_steps {flow_steps}: xAR's sampler needs at least {MIN_STEPS} steps per cell")
        if not math.isfinite(cfg):
            raise UserError(f"--cfg {cfg}: a finite number is required")
        check_precision(precision)
        check_precision(decoder_precision, "--decoder_precision")
        if rounding not in ROUNDINGS:
            raise UserError(f"--rounding {rounding}: choose {' or '.join(ROUNDINGS)}")
        if label_rule not in LABEL_RULES:
            raise UserError(f"--labels {label_rule}: choose {' or '.join(LABEL_RULES)}")

    def precisions(
        self, *, precision: str = "auto", decoder_precision: str = "auto", **settings: Any
    ) -> dict[str, str]:
        """The decoder follows the transformer unless it is set: one region holds both in the official scripts."""
        network = half_on_gpu(self.net.mask.device, precision)
        return {"network": network, "decoder": network if decoder_precision == "auto" else decoder_precision}

    def network_config(self) -> dict[str, Any]:
        return {"class": "XAR", "kwargs": self.net.config}

    def assign_labels(self, seeds: Sequence[int], *, label_rule: str = "balanced", **_) -> Tensor:
        """balanced: class = seed mod number of classes, so that any run of consecutive seeds is balanced to within one
        image, and an image keeps its class in every run. official: the official list, refused where it would pad."""
        if label_rule == "official":
            if len(seeds) % self.num_classes:
                raise UserError(
                    f"--labels official: {len(seeds)} images are not a multiple of {self.num_classes} classes, and the "
                    "official list leaves the rest out; use --labels balanced"
                )
            return official_labels(len(seeds), self.num_classes)
        return torch.tensor([seed % self.num_classes for seed in seeds], dtype=torch.int64)

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        *,
        cfg: float,
        flow_steps: int,
        precision: str = "auto",
        decoder_precision: str = "auto",
        rounding: str = "truncate",
        **_,
    ) -> Tensor:
        """uint8 [B, C, img_size, img_size]. Initial and step noise come from each image's own generator on the device.

        `precision` is of the transformer ("auto": float16 on CUDA, as in the official evaluation, and float32 on the
        CPU), `decoder_precision` of the autoencoder ("auto": as `precision`); the sampler's state is float64.
        """
        precisions = {"precision": precision, "decoder_precision": decoder_precision}
        self.check_settings(cfg=cfg, flow_steps=flow_steps, rounding=rounding, **precisions)
        used = self.precisions(**precisions)
        device = self.net.mask.device
        labels = self.assign_labels(seeds) if labels is None else labels
        random = PerImageRandom(seeds, device)
        with autocast(device, used["network"]):
            latents = sample_latents(self.net, labels.to(device), flow_steps, cfg, random.randn)
        return self.decode(latents, rounding, used.get("decoder", "fp32"))

    def decode(self, latents: Tensor, rounding: str, precision: str = "fp32") -> Tensor:
        """uint8 images of scaled latents [B, z, g, g]; `precision` is of the autoencoder."""
        return decode(self.autoencoder, latents, rounding, precision)

    def prepare(self, images: Tensor) -> Tensor:
        """Posterior moments of the images and of their mirror images, float32 [B, 2, 2z, 16, 16]."""
        if images.shape[1] == 1:
            images = images.expand(-1, self.autoencoder.encoder.conv_in.in_channels, -1, -1)
        if images.shape[-2:] != (self.img_size, self.img_size):
            crops = [center_crop(image.permute(1, 2, 0).cpu().numpy(), self.img_size) for image in images]
            images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(images.device)
        return both_moments(self.autoencoder, images)

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled latents [B, z, 16, 16], from the posterior of the image or, half of the time, its mirror image."""
        B, device = len(prepared), generator.device
        moments = prepared[torch.arange(B, device=device), self.draw_mirrored(B, generator).long()]
        shape = (B, moments.shape[1] // 2, *moments.shape[2:])
        return scaled_latent(moments, torch.randn(shape, generator=generator, device=device))

    def draw_mirrored(self, B: int, generator: torch.Generator) -> Tensor:
        """bool [B]: which images are mirrored this time, half of them where `flip` is on."""
        return (torch.rand(B, generator=generator, device=generator.device) >= 0.5) & self.flip

    @torch.no_grad()
    def through_tokenizer(self, images: Tensor) -> Tensor | None:
        """From the mean of the posterior."""
        mean = self.prepare(images)[:, 0].chunk(2, dim=1)[0]
        return self.decode(SCALE * mean, "truncate")

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        assert labels is not None, "a set without labels is refused"
        random = draw_randomness(x.shape, generator)
        return velocity_loss(self.net, x, labels, random, self.net.label_drop_prob)

    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Biases and norm weights are not decayed; they come first, as in the official optimizer."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.net.named_parameters():
            (plain if parameter.ndim < 2 or name.endswith(".bias") else decayed).append(parameter)
        return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def load_net(
    checkpoint: str | Path,
    device: torch.device,
    model: str | None = None,
    *,
    compiled: bool = False,
    entry: str | None = None,
) -> XAR:
    """The network with the weights of `checkpoint`, frozen and in eval mode; see `XARBackbone.load`."""
    weights = read_checkpoint(checkpoint, entry)
    net = _empty_net(weights, model)
    load_strict(net, weights)
    net = net.to(device).eval().requires_grad_(False)
    if compiled:
        compile_xar(net, device)
    return net


def compile_xar(net: XAR, device: torch.device) -> None:
    """In place: its blocks, which share graphs for all cells."""
    compile_network(net, net.blocks, device, dynamic=True)


def load_autoencoder(path: str | Path, device: torch.device) -> tuple[AutoencoderKL, str]:
    """(autoencoder in eval mode, a name that changes with its weights). Without a configuration in the file: KL-16."""
    weights = read_checkpoint(path)
    if weights.config and weights.config["class"] != "AutoencoderKL":
        raise UserError(f"--vae_path {path}: holds a {weights.config['class']}, not an autoencoder; use kl16.ckpt")
    autoencoder = (
        _from_config(AutoencoderKL, weights, weights.config["kwargs"]) if weights.config else _on_meta(AutoencoderKL)
    )
    weights = dataclasses.replace(weights, state=to_ldm_names(weights.state))
    try:
        load_strict(autoencoder, weights, ignore=("loss.", "model_ema."))  # leftovers of its training
    except UserError as error:
        raise UserError(f"--vae_path {error.message}; use kl16.ckpt") from error
    return autoencoder.to(device).eval().requires_grad_(False), weights_digest(autoencoder)


def _on_meta(make: Callable[..., M], **kwargs: Any) -> M:
    with torch.device("meta"):
        return make(**kwargs)


def _from_config(kind: type[M], weights: Checkpoint, kwargs: Mapping[str, Any]) -> M:
    """The network of the file's configuration, on the meta device."""
    try:
        return _on_meta(kind, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{weights.path}: its configuration is not one of {kind.__name__} ({error})") from error


def _empty_net(weights: Checkpoint, name: str | None) -> XAR:
    """The network of the checkpoint's configuration or of `name`, on the meta device."""
    if weights.config:
        if weights.config["class"] != "XAR":
            raise UserError(f"{weights.path}: holds a {weights.config['class']}, not an xAR transformer")
        return _from_config(XAR, weights, weights.config["kwargs"])
    if name not in SIZES:
        raise UserError(f"--model {name}: no such model; choose one of {', '.join(SIZES)}")
    table = weights.state.get("encoder_pos_embed_learned")
    if table is not None and table.shape[-1] != SIZES[name]["width"]:
        fits = [size for size, numbers in SIZES.items() if numbers["width"] == table.shape[-1]]
        advice = f"; give --model {fits[0]}" if fits else ""
        raise UserError(
            f"{weights.path}: not {name} weights: width {table.shape[-1]} instead of {SIZES[name]['width']}{advice}"
        )
    # Dropout acts in the fine-tune only; the value is the official scripts', as the published files record none.
    return _on_meta(build, name=name, attn_dropout=0.1, proj_dropout=0.1)
