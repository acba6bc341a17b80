"""IMM as a Neon backbone: load, label, sample, and the loss of the self-training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.data_order import batched, windowed_shuffle
from neon_core.kl_vae import weights_digest
from neon_core.precision import PRECISIONS, check_precision, half_on_gpu
from neon_core.seeds import PerImageRandom
from neon_files.checkpoint import Checkpoint, load_strict, open_checkpoint, read_checkpoint
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_imm.labels import file_order, label_plan
from neon_imm.latents import SD_VAE_MEAN, SD_VAE_STD, Codec, RgbCodec, VaeCodec
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond, build_network
from neon_imm.sampler import DISCRETIZATIONS, pushforward, restart, time_grid
from neon_imm.vae_files import DEFAULT_VAE, load_vae, locate_vae
from neon_run.compiling import compile_network

STATES = {"float32": torch.float32, "float64": torch.float64}
LABEL_RULES = ("in_order", "balanced")
SAMPLERS = ("pushforward", "restart")
LATENT_STATISTICS = ("raw_mean", "raw_std", "final_mean", "final_std")


class IMMBackbone(Backbone):
    """A moment matching model with its codec between pixels and samples, and the loss of its training.

    `config` is {"class", "kwargs", "codec", "loss"} and goes into the checkpoints that are written.
    """

    def __init__(self, net: IMMPrecond, codec: Codec, loss: IMMLoss, config: dict[str, Any], codec_name: str = ""):
        self.net = net.eval().requires_grad_(False)
        self.codec, self.loss, self.config = codec, loss, config
        self.img_size, self.num_classes = net.img_resolution * codec.factor, net.label_dim
        self.prepared_key = f"moments-{codec_name}" if codec_name else ""

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device,
        *,
        network: Mapping[str, Any] | None = None,
        latent: bool = True,
        loss: IMMLoss | None = None,
        vae: str | Path | None = None,
        compiled: bool = False,
        k: float | None = None,
        matrix_size: int | None = None,
        entry: str | None = None,
    ) -> IMMBackbone:
        """The network of `checkpoint`: a published pickle, or one of our files, by its configuration.

        `network` (constructor arguments), `latent` (samples are latents, not pixels) and `loss` are those of a bare
        state dict, which has no configuration; `k` and `matrix_size` change the loss of a fine-tune. `vae`
        (default: sd-vae-ft-ema) is not read for a model of pixels. Raises UserError.
        """
        read = read_checkpoint(checkpoint, entry)
        config = full_config(read, network or {}, latent, loss or IMMLoss())
        changes = {"k": k, "matrix_size": matrix_size}
        config["loss"] = {**config["loss"], **{name: value for name, value in changes.items() if value is not None}}
        codec_name = ""
        codec: Codec = RgbCodec(config["kwargs"]["img_channels"])
        if config["codec"]["kind"] == "vae":
            autoencoder = load_vae(vae).to(device).to(memory_format=torch.channels_last)
            if autoencoder.embed_dim != config["kwargs"]["img_channels"]:
                raise UserError(
                    f"--vae {vae}: makes latents of {autoencoder.embed_dim} channels, the network takes "
                    f"{config['kwargs']['img_channels']}; name the one that belongs to it"
                )
            codec_name = weights_digest(autoencoder)
            statistics = {name: config["codec"][name] for name in LATENT_STATISTICS if name in config["codec"]}
            codec = VaeCodec(autoencoder, **statistics, factor=autoencoder.stride)
        net = load_network(read, config).to(device)
        if compiled:
            compile_imm(net, device)
        return cls(net, codec, IMMLoss(**config["loss"]), config, codec_name)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def micro_batch_multiple(self) -> int:
        """Samples that share their times."""
        return self.loss.matrix_size

    @property
    def unused_parameters(self) -> bool:
        """The fine-tune does not augment, so a layer for augmentation labels is unused."""
        return getattr(self.net.model, "map_augment", None) is not None

    def network_config(self) -> dict[str, Any]:
        return self.config

    def blocks(self) -> list[nn.Module]:
        return repeated_blocks(self.net)

    # Sampling

    def assign_labels(self, seeds: Sequence[int], *, label_rule: str = "in_order", **settings: Any) -> Tensor | None:
        """in_order: the classes one after the other, equally often; a remainder goes to the lowest classes. As in the
        official script, so a class depends on the place in the list. balanced: seed mod number of classes, so that an
        image keeps its class when the list is shortened or extended."""
        if label_rule not in LABEL_RULES:
            raise UserError(f"--label_rule {label_rule}: choose {' or '.join(LABEL_RULES)}")
        if not self.num_classes:
            return None
        if label_rule == "balanced":
            return torch.tensor([seed % self.num_classes for seed in seeds], dtype=torch.int64)
        return label_plan(len(seeds), self.num_classes)

    @classmethod
    def frozen_files(
        cls, checkpoint: Path, *, vae: str | Path | None = None, latent: bool = True, **options: Any
    ) -> dict[str, Path]:
        """The autoencoder's weights, unless the checkpoint is a model of pixels."""
        if checkpoint.is_file():
            config = open_checkpoint(checkpoint).config or {}
            latent = config.get("codec", {"kind": "vae" if latent else "rgb"})["kind"] == "vae"
        if not latent:
            return {}
        try:
            return {"vae": locate_vae(vae)[0]}
        except UserError:
            if vae is not None:
                raise
            return {"vae": DEFAULT_VAE}

    @classmethod
    def check_settings(
        cls,
        *,
        num_steps: int = 8,
        cfg: float | None = None,
        discretization: str = "uniform",
        mid_nt: Sequence[float] = (),
        sampler: str = "pushforward",
        precision: str = "auto",
        state: str = "float32",
        label_rule: str = "in_order",
        **settings: Any,
    ) -> None:
        if num_steps < 1:
            raise UserError(f"--num_steps {num_steps}: at least one step is needed")
        if cfg is not None and not math.isfinite(cfg):
            raise UserError(f"--cfg {cfg}: a finite number is required, or none for no guidance")
        if any(not nt > 0 for nt in mid_nt):
            raise UserError(f"--mid_nt {', '.join(map(str, mid_nt))}: noise-to-signal ratios above 0 are required")
        checks = (
            ("discretization", discretization, DISCRETIZATIONS),
            ("sampler", sampler, SAMPLERS),
            ("state", state, STATES),
            ("label_rule", label_rule, LABEL_RULES),
        )
        for flag, value, choices in checks:
            if value not in choices:
                raise UserError(f"--{flag} {value}: choose one of {', '.join(choices)}")
        check_precision(precision)
        check_precision(settings.get("decoder_precision", "auto"), "--decoder_precision")

    def check_network(self, *, cfg: float | None = None, decoder_precision: str = "auto", **settings: Any) -> None:
        if cfg is not None and not self.num_classes:
            raise UserError(f"--cfg {cfg}: this network has no classes, so there is no guidance; use --cfg none")
        if decoder_precision != "auto" and isinstance(self.codec, RgbCodec):
            raise UserError(
                f"--decoder_precision {decoder_precision}: this network makes pixels and has no decoder; leave it out"
            )

    def precisions(
        self, *, precision: str = "auto", decoder_precision: str = "auto", **settings: Any
    ) -> dict[str, str]:
        """Officially the network is float32, and only the autoencoder float16 on GPUs."""
        network = "fp32" if precision == "auto" else precision
        if isinstance(self.codec, RgbCodec):
            return {"network": network}
        return {"network": network, "decoder": half_on_gpu(self.device, decoder_precision)}

    def file_order(self, labels: Tensor | None) -> np.ndarray | None:
        return None if labels is None else file_order(labels)

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        *,
        num_steps: int = 8,
        cfg: float | None = None,
        discretization: str = "uniform",
        mid_nt: Sequence[float] = (),
        sampler: str = "pushforward",
        precision: str = "auto",
        decoder_precision: str = "auto",
        state: str = "float32",
        **_: Any,
    ) -> Tensor:
        """uint8 [B, c, img_size, img_size]. Noise comes from each image's own generator on the device.

        `precision` is of the network and `decoder_precision` of the autoencoder, see `precisions`; `state` of the time
        grid and the sample between steps (float32 officially, float64 in the IMM release).
        """
        used = self.precisions(precision=precision, decoder_precision=decoder_precision)
        network = None if used["network"] == "fp32" else used["network"]
        device, net = self.device, self.net
        random = PerImageRandom(seeds, device)
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        latents = random.randn(*shape) * net.sigma_data
        grid = time_grid(net.schedule, discretization, num_steps, mid_nt, STATES[state], device)
        rows = self.one_hot(labels)
        with net.running(training=False, mixed_precision=network):
            if sampler == "restart":
                noises = [random.randn(*shape) for _ in range(len(grid) - 2)]
                x = restart(net, latents, grid, noises, rows, cfg)
            else:
                x = pushforward(net, latents, grid, rows, cfg)
        return self.codec.decode(x.float(), used.get("decoder", "fp32")).contiguous()

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """int64 [B] -> float32 [B, K] on the device, a negative label -> zeros: unconditional."""
        if labels is None or not self.num_classes:
            return None
        rows = F.one_hot(labels.clamp(min=0).to(self.device), self.num_classes).float()
        return rows * (labels >= 0).to(rows)[:, None]

    # Training

    def check_set(self, images: ImageSet) -> None:
        """Images of the model's size, or their moments, which are then not cached again."""
        side = self.net.img_resolution
        if images.shape == (2 * self.net.img_channels, side, side) and isinstance(self.codec, VaeCodec):
            self.prepared_key = ""
        elif images.shape[1:] != (self.img_size, self.img_size) or images.shape[0] not in (1, 3):
            raise UserError(
                f"{images.path}: items of shape {list(images.shape)}; this model takes images of {self.img_size}x"
                f"{self.img_size} pixels"
                + (f", or moments [{2 * self.net.img_channels}, {side}, {side}]" if self.prepared_key else "")
            )
        elif isinstance(self.codec, RgbCodec) and images.shape[0] != self.codec.channels:
            raise UserError(
                f"{images.path}: images of {images.shape[0]} channels; this model takes {self.codec.channels}"
            )

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 pixels -> moments (mean | std, or pixels in [-1, 1]); moments pass unchanged."""
        return self.codec.moments(images) if images.dtype == torch.uint8 else images

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """Samples [B, C, h, w]: latents are drawn from their moments at every visit."""
        return self.codec.draw(prepared, generator)

    def through_tokenizer(self, images: Tensor) -> Tensor | None:
        """From the mean of the moments; None for a model of pixels."""
        if not isinstance(self.codec, VaeCodec):
            return None
        moments = self.prepare(images)
        return self.codec.decode(self.codec.scale_moments(moments, torch.zeros_like(moments[:, : self.codec.channels])))

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Mean over groups. The student runs in the precision of the autocast region around, the teacher in fp32."""
        precision = None
        if torch.is_autocast_enabled(x.device.type):
            around = torch.get_autocast_dtype(x.device.type)
            precision = next(name for name, dtype in PRECISIONS.items() if dtype == around)
        with self.net.running(training=self.net.training, mixed_precision=precision):
            return self.loss(self.net, x, self.one_hot(labels), generator)[0].mean()

    def data_order(self, num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        """The official endless windowed shuffle, all ranks together."""
        return batched(windowed_shuffle(num_items, seed), batch_size)


def full_config(read: Checkpoint, network: Mapping[str, Any], latent: bool, loss: IMMLoss) -> dict[str, Any]:
    """{"class", "kwargs", "codec", "loss"} from the file's configuration, the rest from the arguments.

    Raises UserError where neither describes the network.
    """
    config: dict[str, Any] = dict(read.config) if read.config else {"class": "IMMPrecond", "kwargs": dict(network)}
    if not config["kwargs"] and not config.get("args"):
        raise UserError(f"{read.path}: has no configuration of its network; use a published pickle, or our own files")
    if args := config.pop("args", None):
        names = ("img_resolution", "img_channels", "label_dim")
        config["kwargs"] = {**dict(zip(names, args, strict=False)), **config["kwargs"]}
    vae = {"kind": "vae", "raw_mean": SD_VAE_MEAN, "raw_std": SD_VAE_STD, "final_mean": 0.0, "final_std": 0.5}
    config.setdefault("codec", vae if latent else {"kind": "rgb"})
    config.setdefault("loss", dataclasses.asdict(loss))
    return config


def load_network(read: Checkpoint, config: dict[str, Any]) -> IMMPrecond:
    """The network of `config` on the CPU, with the weights of `read`. Raises UserError."""
    with torch.device("meta"):  # no time for random weights that are overwritten
        net = build_network(config)
    net = net.to_empty(device="cpu")
    load_strict(net, read)
    return net


def repeated_blocks(net: IMMPrecond) -> list[nn.Module]:
    """The transformer's blocks; the U-Net's are too different to be units."""
    return list(getattr(net.model, "blocks", []))


def compile_imm(net: IMMPrecond, device: torch.device) -> None:
    """In place: its blocks, which share one graph, or the U-Net, which has none."""
    compile_network(net, repeated_blocks(net) or [net.model], device, dynamic=False)
