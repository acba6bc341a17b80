"""VAR as a Neon backbone: Neon trains and merges the transformer, the VQVAE stays frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neon_core.backbone import Backbone
from neon_core.distributed import file_hash
from neon_core.precision import autocast, check_precision, half_on_gpu
from neon_core.seeds import PerImageRandom
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_run.compiling import compile_network
from neon_var import loss, official, preprocessing
from neon_var.loading import find_vae, load_vae, load_var
from neon_var.sampler import BatchNoise, PerImageNoise, TokenNoise, decode_images, sample_tokens, to_uint8
from neon_var.var import VAR
from neon_var.vqvae import VQVAE

CROPS = ("official", "none")
ENCODE_BATCH = 32  # images at a time through the VQVAE encoder, whose activations are large


class VARBackbone(Backbone):
    """See `neon_core.backbone.Backbone`. `encode` returns tokens int64 [B, L]."""

    vae_path: Path | None = None  # of the tokenizer, where it came from a file

    def __init__(self, net: VAR, vae: VQVAE, net_kwargs: dict[str, Any], token_crops: int = 0, crop: str = "official"):
        """How the fine-tune sees an image. crop "official": cut from the enlarged image, at a new random place at every
        visit, or with token_crops > 0 at that many fixed places, whose tokens are kept on disk; "none": the image as it
        is, whose tokens are kept too."""
        self.net, self.vae, self._net_kwargs = net, vae, net_kwargs
        self.img_size, self.num_classes = vae.downsampling * net.patch_nums[-1], net.num_classes
        self.token_crops, self.crop = token_crops, crop
        if crop not in CROPS or (token_crops and crop == "none"):
            raise UserError(f"--crop {crop}: must be official or none, and --token_crops {token_crops} needs official")
        if token_crops or crop == "none":
            kept = f"tokens{token_crops}" if token_crops else "uncropped"
            self.prepared_key = f"var-{kept}-{_weights_digest(vae)}"

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device,
        *,
        architecture: str | None = None,
        vae_ckpt: str | Path | None = None,
        model_depth: int | None = None,
        compiled: bool = False,
        token_crops: int = 0,
        crop: str = "official",
        entry: str | None = None,
    ) -> VARBackbone:
        """The network of `checkpoint` beside the VQVAE of `vae_ckpt` (default: where download_models.sh puts it).

        `architecture`, a key of `ARCHITECTURES`, describes a published file, which carries no configuration.
        """
        net, net_kwargs = load_var(checkpoint, architecture, model_depth, entry)
        vae_path = find_vae(vae_ckpt)
        vae = load_vae(vae_path, net)
        if compiled:
            compile_var(net, device)
        backbone = cls(net.to(device).eval().requires_grad_(False), vae.to(device), net_kwargs, token_crops, crop)
        backbone.vae_path = vae_path
        return backbone

    def network_config(self) -> dict[str, Any]:
        return {"class": "VAR", "kwargs": self._net_kwargs}

    @property
    def device(self) -> torch.device:
        return self.net.pos_start.device

    # Sampling

    def assign_labels(self, seeds: Sequence[int], *, official_seeds: bool = False, **settings) -> Tensor:
        """Every run of `num_classes` seeds (0 .. K-1, K .. 2K-1, ...) has each class once, in shuffled order, so that
        a label depends on its seed alone; with `official_seeds` the official script's list for `--seed` seeds[0]."""
        if official_seeds:
            return official.balanced_labels(len(seeds), self.num_classes, seeds[0])
        shuffled: dict[int, Tensor] = {}
        labels = torch.empty(len(seeds), dtype=torch.int64)
        for i, seed in enumerate(seeds):
            block, place = divmod(seed, self.num_classes)
            if block not in shuffled:
                generator = torch.Generator().manual_seed(block)
                shuffled[block] = torch.randperm(self.num_classes, generator=generator)
            labels[i] = shuffled[block][place]
        return labels

    @classmethod
    def frozen_files(cls, checkpoint: Path, *, vae_ckpt: Path | None = None, **options: Any) -> dict[str, Path]:
        return {"vae_ckpt": find_vae(vae_ckpt)}

    @classmethod
    def check_settings(
        cls,
        *,
        cfg: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        precision: str = "auto",
        decoder_precision: str = "auto",
        **settings: Any,
    ) -> None:
        if top_k < 0:
            raise UserError(f"--top_k {top_k}: a number of tokens is required, 0: all")
        if not 0 <= top_p <= 1:
            raise UserError(f"--top_p {top_p}: a probability is required, 0 (off) to 1")
        if not np.isfinite(cfg):
            raise UserError(f"--cfg {cfg}: a finite number is required")
        if not 0 < temperature < np.inf:
            raise UserError(f"--temperature {temperature}: a finite number above 0 is required, 1: off")
        check_precision(precision)
        check_precision(decoder_precision, "--decoder_precision")

    def check_network(self, *, top_k: int = 0, **settings: Any) -> None:
        if top_k > self.net.vocab_size:
            raise UserError(f"--top_k {top_k}: the vocabulary has {self.net.vocab_size} tokens; use 0 (off) to that")

    def arrays(self, *, tokens: bool = False, **settings: Any) -> bool:
        return tokens

    def precisions(
        self, *, precision: str = "auto", decoder_precision: str = "auto", tokens: bool = False, **settings: Any
    ) -> dict[str, str]:
        """The decoder follows the transformer unless it is set: one region holds both in the official scripts."""
        network = half_on_gpu(self.device, precision)
        if tokens:
            return {"network": network}
        return {"network": network, "decoder": network if decoder_precision == "auto" else decoder_precision}

    def check_set(self, images: ImageSet) -> None:
        shape, place = images.shape, images.path
        if (images.manifest or {}).get("settings", {}).get("tokens"):
            self._check_tokens(images)
        elif images.dtype != np.uint8:
            raise UserError(f"{place}: holds arrays of {images.dtype}; images, or tokens of --tokens, are required")
        elif shape[0] not in (1, self.vae.in_channels):
            raise UserError(f"{place}: colour images, but the tokenizer is for grey ones; use a set of grey images")
        elif min(shape[1:]) < self.vae.downsampling:
            raise UserError(f"{place}: images of shape {shape} are too small for the tokenizer")
        elif self.crop == "none" and shape[1:] != (self.img_size, self.img_size):
            raise UserError(f"{place}: images of shape {shape}; --crop none requires {self.img_size} pixels a side")

    def _check_tokens(self, images: ImageSet) -> None:
        """UserError where the tokens of a set are not this tokenizer's."""
        place, made_with = images.path, (images.manifest or {}).get("vae_ckpt_sha256")
        if self.vae_path is not None and made_with != file_hash(self.vae_path):
            raise UserError(f"{place}: holds tokens of another tokenizer; name it with --vae_ckpt")
        if images.shape != (1, 1, self.net.num_tokens):
            raise UserError(f"{place}: items of shape {images.shape}; this network has {self.net.num_tokens} tokens")
        if images.flipped.any():
            raise UserError(f"{place}: holds tokens, which cannot be mirrored; leave --xflip out")
        if self.token_crops:
            raise UserError(f"{place}: holds tokens, which cannot be cropped; leave --token_crops out")

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        precision: str = "auto",
        decoder_precision: str = "auto",
        official_seeds: bool = False,
        rounding: str = "truncate",
        decode_batch: int | None = None,
        temperature: float = 1.0,
        tokens: bool = False,
    ) -> Tensor:
        """uint8 [B, 3, img_size, img_size], or with `tokens` instead the tokens that were drawn, float32 [B, 1, 1, L].
        A negative label is no class.

        official_seeds: one generator for the batch, seeded with its first seed (the official script on one rank).
        precision "auto": float16 on CUDA, as the official evaluation, and float32 on the CPU. `decoder_precision` is of
        the VQVAE's decoder; "auto": as `precision`.
        """
        precisions: dict[str, Any] = {"precision": precision, "decoder_precision": decoder_precision}
        self.check_settings(cfg=cfg, top_k=top_k, top_p=top_p, temperature=temperature, **precisions)
        self.check_network(top_k=top_k)
        device = self.device
        labels = self.assign_labels(seeds, official_seeds=official_seeds) if labels is None else labels
        labels = torch.where(labels < 0, self.num_classes, labels).to(device)
        noise: TokenNoise
        if official_seeds:
            noise = BatchNoise(torch.Generator(device).manual_seed(seeds[0]))
        else:
            noise = PerImageNoise(PerImageRandom(seeds, device))
        used = self.precisions(**precisions)
        with autocast(device, used["network"]):
            drawn, f_hat = sample_tokens(
                self.net,
                self.vae,
                labels,
                noise,
                cfg=cfg,
                top_k=top_k,
                top_p=top_p,
                more_smooth=more_smooth,
                temperature=temperature,
            )
        if tokens:
            return drawn[:, None, None].float()
        return to_uint8(decode_images(self.vae, f_hat, used["decoder"], decode_batch), rounding)

    # Training

    def prepare(self, images: Tensor) -> Tensor:
        """Enlarged images, uint8 [B, 3, h, w]; or tokens, int32 [B, n, L]: of `token_crops` crops, of the image itself
        (crop "none"), or those that a set of tokens holds.

        The crops of an image are a function of its pixels.
        """
        if images.is_floating_point():
            return images[:, 0].int()
        if self.crop == "none":
            return self._tokens(self._uncropped(images))[:, None].int()
        large = self._enlarged(images)
        if not self.token_crops:
            return large
        tokens = []
        for image in large:
            seed = int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:7], "little")
            copies = image.expand(self.token_crops, -1, -1, -1)
            crops = preprocessing.random_crops(copies, self.img_size, torch.Generator().manual_seed(seed))
            tokens.append(self._tokens(crops.to(self.device)).int())
        return torch.stack(tokens)

    def encode(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens int64 [B, L] of a random crop of each image, or one of its rows of kept tokens."""
        if prepared.dim() == 3:
            kept = prepared.shape[1]
            choice = torch.randint(kept, (len(prepared),), generator=generator, device=generator.device)
            return prepared[torch.arange(len(prepared), device=prepared.device), choice].long()
        return self._tokens(preprocessing.random_crops(prepared, self.img_size, generator))

    def _uncropped(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device, in the tokenizer's channels."""
        return images.expand(-1, self.vae.in_channels, -1, -1).to(self.device)

    def _enlarged(self, images: Tensor) -> Tensor:
        """uint8 [B, C, h, w] on the CPU; of a grey image all channels are equal."""
        with ThreadPoolExecutor(max_workers=min(8, len(images))) as pool:
            large = torch.cat(list(pool.map(lambda x: preprocessing.enlarge_batch(x[None], self.img_size), images)))
        return large[:, : self.vae.in_channels]

    def through_tokenizer(self, images: Tensor) -> Tensor | None:
        """The images, or with crop "official" the middle of their enlarged form, from their tokens; None of tokens,
        which pass no tokenizer."""
        if images.is_floating_point():
            return None
        seen = self._uncropped(images)
        if self.crop == "official":
            large, side = self._enlarged(images), self.img_size
            top, left = ((size - side) // 2 for size in large.shape[-2:])
            seen = large[..., top : top + side, left : left + side].to(self.device)
        return torch.cat([self.redraw(part) for part in seen.split(ENCODE_BATCH)])

    @torch.no_grad()
    def _tokens(self, crops: Tensor) -> Tensor:
        """int64 [B, L] of uint8 [B, C, img_size, img_size]."""
        parts = crops.split(ENCODE_BATCH)
        return torch.cat([torch.cat(self.vae.encode(preprocessing.to_unit_range(part)), dim=1) for part in parts])

    @torch.no_grad()
    def redraw(self, images: Tensor) -> Tensor:
        """uint8 [B, C, img_size, img_size], through the tokenizer and back: the best that any tokens of its make."""
        *_, (_, f_hat) = self.vae.quantize.scales(self.vae.features(preprocessing.to_unit_range(images)))
        return to_uint8(decode_images(self.vae, f_hat, "fp32"))

    def self_training_loss(self, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the tokens `x` [B, L] in teacher forcing, with label drop and stochastic depth."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            inputs = self.vae.tokens_to_input(x)
        uniform = torch.rand(len(x), generator=generator, device=generator.device)
        keep = self.net.draw_drop_path(len(x), generator)
        return loss.token_loss(self.net(labels, inputs, uniform, keep), x, self.net.num_tokens)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return loss.parameter_groups(self.net, weight_decay)

    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def data_order(self, num_items: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
        return official.global_batches(num_items, batch_size, seed)


def compile_var(net: VAR, device: torch.device) -> None:
    """In place: its blocks, which share graphs for all scales."""
    compile_network(net, net.blocks, device, dynamic=True)


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
