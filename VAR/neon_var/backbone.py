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
from neon_core.precision import autocast, check_precision
from neon_core.seeds import PerImageRandom
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_var import loss, official, preprocessing
from neon_var.loading import find_vae, load_vae, load_var
from neon_var.sampler import BatchNoise, PerImageNoise, sample_images, to_uint8
from neon_var.var import VAR
from neon_var.vqvae import VQVAE

ENCODE_BATCH = 32  # images at a time through the VQVAE encoder, whose activations are large


class VARBackbone(Backbone):
    """See `neon_core.backbone.Backbone`. `encode` returns tokens int64 [B, L]."""

    def __init__(self, net: VAR, vae: VQVAE, net_kwargs: dict[str, Any], token_crops: int = 0):
        """token_crops > 0: the fine-tune sees that many fixed crops of each image, whose tokens are kept on disk;
        0: a new random crop at every visit, as officially."""
        self.net, self.vae, self._net_kwargs = net, vae, net_kwargs
        self.img_size, self.num_classes = 16 * net.patch_nums[-1], net.num_classes
        self.token_crops = token_crops
        if token_crops:
            self.prepared_key = f"var-tokens{token_crops}-{_weights_digest(vae)}"

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
        entry: str | None = None,
    ) -> VARBackbone:
        """The network of `checkpoint` beside the VQVAE of `vae_ckpt` (default: where download_models.sh puts it).

        `architecture`, a key of `ARCHITECTURES`, describes a published file, which carries no configuration.
        """
        net, net_kwargs = load_var(checkpoint, architecture, model_depth, entry)
        vae = load_vae(vae_ckpt, net)
        if compiled:
            net.compile_blocks()
        return cls(net.to(device).eval().requires_grad_(False), vae.to(device), net_kwargs, token_crops)

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
        cls, *, cfg: float = 0.0, top_k: int = 0, top_p: float = 0.0, precision: str = "auto", **settings: Any
    ) -> None:
        if top_k < 0:
            raise UserError(f"--top_k {top_k}: a number of tokens is required, 0: all")
        if not 0 <= top_p <= 1:
            raise UserError(f"--top_p {top_p}: a probability is required, 0 (off) to 1")
        if not np.isfinite(cfg):
            raise UserError(f"--cfg {cfg}: a finite number is required")
        check_precision(precision)

    def check_network(self, *, top_k: int = 0, **settings: Any) -> None:
        if top_k > self.net.vocab_size:
            raise UserError(f"--top_k {top_k}: the vocabulary has {self.net.vocab_size} tokens; use 0 (off) to that")

    def check_set(self, images: ImageSet) -> None:
        if min(images.shape[1:]) < 16:
            raise UserError(f"{images.path}: images of shape {images.shape} are too small for the tokenizer")

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
        official_seeds: bool = False,
        rounding: str = "truncate",
        decode_batch: int | None = None,
    ) -> Tensor:
        """uint8 [B, 3, img_size, img_size]. A negative label is no class.

        official_seeds: one generator for the batch, seeded with its first seed (the official script on one rank).
        precision "auto": float16 on CUDA, as the official evaluation, and float32 on the CPU.
        """
        self.check_settings(cfg=cfg, top_k=top_k, top_p=top_p, precision=precision)
        self.check_network(top_k=top_k)
        device = self.device
        labels = self.assign_labels(seeds, official_seeds=official_seeds) if labels is None else labels
        labels = torch.where(labels < 0, self.num_classes, labels).to(device)
        if official_seeds:
            noise = BatchNoise(torch.Generator(device).manual_seed(seeds[0]))
        else:
            noise = PerImageNoise(PerImageRandom(seeds, device))
        with autocast(device, precision):
            images = sample_images(
                self.net,
                self.vae,
                labels,
                noise,
                cfg=cfg,
                top_k=top_k,
                top_p=top_p,
                more_smooth=more_smooth,
                decode_batch=decode_batch,
            )
        return to_uint8(images, rounding)

    # Training

    def prepare(self, images: Tensor) -> Tensor:
        """Enlarged images, uint8 [B, 3, h, w]; with `token_crops` the tokens of that many crops, int32 [B, n, L].

        The crops of an image are a function of its pixels.
        """
        with ThreadPoolExecutor(max_workers=min(8, len(images))) as pool:
            large = torch.cat(list(pool.map(lambda x: preprocessing.enlarge_batch(x[None], self.img_size), images)))
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
        """Tokens int64 [B, L] of a random crop of each image, or of one of its kept crops."""
        if self.token_crops:
            choice = torch.randint(self.token_crops, (len(prepared),), generator=generator, device=generator.device)
            return prepared[torch.arange(len(prepared), device=prepared.device), choice].long()
        return self._tokens(preprocessing.random_crops(prepared, self.img_size, generator))

    @torch.no_grad()
    def _tokens(self, crops: Tensor) -> Tensor:
        """int64 [B, L] of uint8 [B, 3, img_size, img_size]."""
        parts = crops.split(ENCODE_BATCH)
        return torch.cat([torch.cat(self.vae.encode(preprocessing.to_unit_range(part)), dim=1) for part in parts])

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


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
