"""EDM as a Neon backbone: load, label, sample, and the loss of the self-training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.data_order import batched, windowed_shuffle
from neon_core.precision import PRECISIONS, check_precision
from neon_core.seeds import PerImageRandom
from neon_edm.augment import AugmentPipe
from neon_edm.layers import UNetBlock
from neon_edm.loss import LOSSES, EDMLoss, GeneratorRandom, Loss, Random
from neon_edm.precond import Precond, build_network, named_arguments
from neon_edm.sampler import Denoiser, edm_sampler, to_uint8
from neon_files.checkpoint import Checkpoint, load_strict, read_checkpoint
from neon_files.downloads import fetch
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_run.compiling import compile_network

LABEL_CHUNK = 256  # images whose labels are drawn together; affects memory only


class EDMBackbone(Backbone):
    """A preconditioned U-Net with EDM's sampler and loss.

    `config` is {"class", "kwargs"} of `net` and goes into the checkpoints that are written. `loss` defaults to the one
    that belongs to the preconditioner; `augment` None trains on the images as they are.
    """

    def __init__(
        self,
        net: Precond,
        config: dict[str, Any],
        device: torch.device | str = "cpu",
        *,
        loss: Loss | None = None,
        augment: AugmentPipe | None = None,
    ):
        self.device = torch.device(device)
        # Channels last suits the convolutions of tensor cores; on the CPU it gains nothing.
        self.memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.net = net.to(self.device).to(memory_format=self.memory_format).eval().requires_grad_(False)
        self.config = config
        self.loss = LOSSES.get(type(net).__name__, EDMLoss)() if loss is None else loss
        self.augment = augment
        self._drawn_labels: dict[int, int] = {}  # by seed: every point of a search uses the same ones

    @property
    def img_size(self) -> int:
        return self.net.img_resolution

    @property
    def num_classes(self) -> int:
        return self.net.label_dim

    @property
    def unused_parameters(self) -> bool:
        """Images that are not augmented leave the layer for augmentation labels out."""
        return self.augment is None and getattr(self.net.model, "map_augment", None) is not None

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device,
        *,
        compiled: bool = False,
        augment: float = 0.0,
        dropout: float | None = None,
        entry: str | None = None,
    ) -> EDMBackbone:
        """The network that `checkpoint` describes: a published pickle or one of our files. Raises UserError.

        For a fine-tune: `augment` is the probability of each augmentation, `dropout` replaces the network's.
        """
        read = read_checkpoint(fetch(checkpoint), entry)
        config = network_config(read)
        if dropout is not None:
            config["kwargs"]["dropout"] = dropout
        net = load_network(read, config)
        if augment > 0 and getattr(net.model, "map_augment", None) is None:
            raise UserError(f"{checkpoint}: this network takes no augmentation labels; train it with --augment 0")
        if compiled:
            compile_edm(net, torch.device(device))
        return cls(net, config, device, augment=augmentation(augment) if augment > 0 else None)

    @classmethod
    def check_settings(
        cls, *, sigma_min: float = 0.002, sigma_max: float = 80.0, precision: str = "auto", **settings: Any
    ) -> None:
        if sigma_min >= sigma_max:
            raise UserError(f"--sigma_min {sigma_min}: must be below --sigma_max {sigma_max}")
        check_precision(precision)

    def check_network(self, *, class_idx: int | None = None, **settings: Any) -> None:
        if class_idx is not None and not self.num_classes:
            raise UserError(f"--class {class_idx}: this network is unconditional; leave --class out")
        if class_idx is not None and not 0 <= class_idx < self.num_classes:
            raise UserError(f"--class {class_idx}: this network has classes 0 to {self.num_classes - 1}")

    def precisions(self, *, precision: str = "auto", **settings: Any) -> dict[str, str]:
        dtype = self.net.unet_dtype(self.device, precision)
        return {"network": next(name for name, value in PRECISIONS.items() if value == dtype)}

    def check_set(self, images: ImageSet) -> None:
        shape = (self.net.img_channels, self.img_size, self.img_size)
        if images.shape != shape:
            raise UserError(f"{images.path}: images of shape {images.shape}, but this network makes {shape}")
        if self.num_classes and not images.has_labels:
            raise UserError(
                f"{images.path}: no labels, but this network is conditional; if the files are named like "
                f"000123_label7.png, run: PYTHONPATH=edm:. python -m neon_edm.data --root {images.path}"
            )

    def assign_labels(self, seeds: Sequence[int], class_idx: int | None = None, **settings: Any) -> Tensor | None:
        """`class_idx` for all, else a class drawn from each image's own generator, right after its latents.

        Raises UserError if `class_idx` is out of range, or given for an unconditional network.
        """
        self.check_network(class_idx=class_idx)
        if class_idx is not None:
            return torch.full((len(seeds),), class_idx, dtype=torch.int64)
        if not self.num_classes:
            return None
        new = [seed for seed in seeds if seed not in self._drawn_labels]
        for start in range(0, len(new), LABEL_CHUNK):
            chunk = new[start : start + LABEL_CHUNK]
            random = PerImageRandom(chunk, self.device)
            random.randn(*self._latent_shape)
            self._drawn_labels.update(zip(chunk, random.randint(self.num_classes).tolist(), strict=True))
        return torch.tensor([self._drawn_labels[seed] for seed in seeds], dtype=torch.int64)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self.net.img_channels, self.img_size, self.img_size

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        class_idx: int | None = None,
        precision: str = "auto",
        **settings: Any,
    ) -> Tensor:
        """uint8 [B, C, R, R]. `settings` are those of `edm_sampler`; a network left in train mode samples in eval mode.

        `precision` is of the U-Net, the state is float64. "auto": what the checkpoint says, as in the official scripts.
        Every image draws from its own generator, in the official order: latents, its class (unless `class_idx` fixes
        it), and the noise of each step.
        """
        random = PerImageRandom(seeds, self.device)
        latents = random.randn(*self._latent_shape).contiguous(memory_format=self.memory_format)
        if self.num_classes and class_idx is None:
            random.randint(self.num_classes)
        noise = lambda: random.randn(*self._latent_shape, dtype=torch.float64)  # noqa: E731
        was_training = self.net.training
        self.net.eval()
        try:
            with self.net.frozen(self.device, precision):
                images = edm_sampler(self.denoiser(), latents, self.one_hot(labels), noise, **settings)
            return to_uint8(images).contiguous()
        finally:
            self.net.train(was_training)

    def denoiser(self) -> Denoiser:
        """The network as the sampler calls it."""
        return self.net

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """int64 [B] -> float32 [B, K] on the device; None for an unconditional network."""
        if labels is None or not self.num_classes:
            return None
        return F.one_hot(labels.to(self.device), self.num_classes).to(torch.float32)

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 -> float32 in [-1, 1]; no random number is used."""
        x = prepared.to(torch.float32) / 127.5 - 1
        return x.contiguous(memory_format=self.memory_format)

    def random(self, generator: torch.Generator) -> Random:
        """The source of random numbers of loss and augmentation."""
        return GeneratorRandom(generator, self.device)

    def self_training_loss(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """The loss map, summed over pixels and averaged over the B images, as in the official loop."""
        loss = self.loss(self.net, x, self.one_hot(labels), self.random(generator), self.augment)  # [B, C, R, R]
        return loss.sum() / x.shape[0]

    def network_config(self) -> dict[str, Any]:
        return self.config

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.net.modules() if isinstance(module, UNetBlock)]

    def data_order(self, num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        """EDM's endless windowed shuffle: together, the ranks visit the same items as the official ones."""
        return batched(windowed_shuffle(num_items, seed), batch_size)


def compile_edm(net: Precond, device: torch.device) -> None:
    """In place: the U-Net."""
    compile_network(net, [net.model], device, dynamic=False)


def augmentation(p: float) -> AugmentPipe:
    """The augmentation of the official train.py --augment=p: a mirror image always possible, no colours."""
    return AugmentPipe(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def network_config(read: Checkpoint) -> dict[str, Any]:
    """{"class", "kwargs"} of the file, every argument by name. Raises UserError where it has none."""
    if not read.config:
        raise UserError(
            f"{read.path}: has no configuration of its network; use an EDM pickle, or a file that Neon wrote"
        )
    try:
        kwargs = named_arguments(read.config["class"], read.config.get("args", ()), read.config["kwargs"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{read.path}: not a supported EDM network ({error})") from error
    return {"class": read.config["class"], "kwargs": kwargs}


def load_network(read: Checkpoint, config: dict[str, Any]) -> Precond:
    """The network of `config` on the CPU, in eval mode, with the weights and buffers of `read`, buffers included:
    merged ones differ from the constants in the last bit. Raises UserError where they do not fit."""
    try:
        with torch.device("meta"):  # no time for random weights that are overwritten
            net = build_network(config["class"], config["kwargs"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{read.path}: not a supported EDM network ({error})") from error
    load_strict(net, read)
    return net.eval()
