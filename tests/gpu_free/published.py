"""Every published network at its full size behind its backbone, on the fake GPU: shapes, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_free.fake_cuda import GPU, Record, built

from neon_core.backbone import Backbone
from neon_core.kl_vae import AutoencoderKL
from neon_core.selftrain import FineTune
from neon_edm.backbone import EDMBackbone, augmentation
from neon_edm.precond import build_network as edm_network
from neon_edm.rows import ROWS as EDM
from neon_imm.backbone import IMMBackbone
from neon_imm.latents import RgbCodec, VaeCodec
from neon_imm.precond import build_network as imm_network
from neon_imm.rows import ROWS as IMM
from neon_imm.vae_files import SD_VAE_CONFIG
from neon_run.row import Row
from neon_var.architectures import ARCHITECTURES, tokenizer
from neon_var.backbone import VARBackbone
from neon_var.rows import ROWS as VAR_ROWS
from neon_var.var import VAR
from neon_var.vqvae import VQVAE
from neon_xar.backbone import XARBackbone
from neon_xar.rows import ROWS as XAR_ROWS
from neon_xar.xar import build as xar_network

FOUND = {row.id: row for row in (*VAR_ROWS, *XAR_ROWS, *EDM, *IMM)}

# What the published pickles of EDM say about themselves (Karras et al. 2022, table 7, DDPM++).
DDPMPP: dict[str, Any] = {
    "img_channels": 3, "model_type": "SongUNet", "embedding_type": "positional", "encoder_type": "standard",
    "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1], "model_channels": 128,
    "augment_dim": 9,
}  # fmt: skip
EDM_KWARGS = {
    "cifar10_cond": DDPMPP | {"img_resolution": 32, "label_dim": 10, "channel_mult": [2, 2, 2], "dropout": 0.13},
    "cifar10_uncond": DDPMPP | {"img_resolution": 32, "label_dim": 0, "channel_mult": [2, 2, 2], "dropout": 0.13},
    "ffhq64": DDPMPP | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
}


def var(name: str) -> VARBackbone:
    architecture = ARCHITECTURES[name]
    kwargs = architecture.network()
    net, vae = built(VAR, **kwargs), built(VQVAE, **tokenizer(architecture.patch_nums))
    return VARBackbone(net.eval().requires_grad_(False), vae.eval().requires_grad_(False), kwargs)


def xar(name: str) -> XARBackbone:
    net = built(xar_network, name, attn_dropout=0.1, proj_dropout=0.1)
    return XARBackbone(net.eval().requires_grad_(False), built(AutoencoderKL))


def edm(name: str, use_fp16: bool = False) -> EDMBackbone:
    kwargs = EDM_KWARGS[name] | {"use_fp16": use_fp16}
    net = built(edm_network, "EDMPrecond", kwargs, memory_format=torch.channels_last)
    augment = augmentation(FOUND[f"edm/{name}"].load_training["augment"])
    return EDMBackbone(net, {"class": "EDMPrecond", "kwargs": kwargs}, GPU, augment=augment)


def imm(name: str) -> IMMBackbone:
    load = FOUND[f"imm/{name}"].load
    config = {"class": "IMMPrecond", "kwargs": load["network"]}
    codec, codec_name = RgbCodec(), ""
    if load.get("latent", True):
        vae = built(lambda: AutoencoderKL.from_diffusers_config(SD_VAE_CONFIG), memory_format=torch.channels_last)
        codec, codec_name = VaeCodec(vae.eval().requires_grad_(False)), "sd"
    return IMMBackbone(built(imm_network, config), codec, load["loss"], config, codec_name)


@dataclass(frozen=True)
class Published:
    """A row with its network, the batch of its sampling, and what a sampling call takes."""

    row: Row
    build: Callable[[], Backbone]
    settings: dict[str, Any]
    steps: str = ""  # the setting that the cost is linear in; "": there is none
    calls: Callable[[int], int] = lambda steps: steps  # network calls of a batch

    @property
    def batch(self) -> int:
        return self.row.batch_size

    def sampling(self, backbone: Backbone, **changes: Any) -> torch.Tensor:
        """uint8 images of one batch."""
        settings = self.settings | changes
        seeds = list(range(self.batch))
        labels = torch.zeros(self.batch, dtype=torch.int64) if backbone.num_classes else None
        return backbone.sample(seeds, labels, **settings)

    def fine_tune(self, backbone: Backbone, precision: str | None = None, **parallel: Any) -> FineTune:
        """The fine-tune of the row, one micro batch a step."""
        train = self.row.train
        settings = replace(train, batch_size=train.micro_batch_size, precision=precision or train.precision)
        return FineTune(backbone, settings, GPU, **parallel)


def training_step(run: FineTune, record: Record) -> None:
    """Prepare, encode, loss, backward, optimizer step."""
    backbone, size = run.backbone, run.settings.micro_batch_size
    image = torch.zeros(1, 3, backbone.img_size, backbone.img_size, dtype=torch.uint8)
    with torch.no_grad():
        prepared = backbone.prepare(image.to(GPU) if backbone.prepared_key else image)
    prepared = prepared.expand(size, *prepared.shape[1:])
    labels = torch.zeros(size, dtype=torch.int64).to(GPU) if backbone.num_classes else None
    generator = torch.Generator(GPU)
    with torch.no_grad():
        x = backbone.encode(prepared.to(GPU), generator)
    record.leaves(backbone.net.parameters())
    run.step([(x, labels, generator)])


def _row(build: Callable[[str], Backbone], id: str, steps: str = "", calls=lambda steps: steps, **more) -> Published:
    row = FOUND[id]
    return Published(row, lambda: build(row.name), {**row.evaluate, **more}, steps, calls)


def _var_row(name: str) -> Published:
    return _row(var, f"var/{name}", calls=lambda _: len(ARCHITECTURES[name].patch_nums))


# fmt: off
ROWS: dict[str, Published] = {
    "var/imagenet_256": _var_row("imagenet_256"),
    "var/imagenet_512": _var_row("imagenet_512"),
    **{f"xar/{name}": _row(xar, f"xar/{name}", "flow_steps", lambda steps: 4 * steps)
       for name in ("xar_base", "xar_large", "xar_huge")},
    **{f"edm/{name}": _row(edm, f"edm/{name}", "num_steps", lambda steps: 2 * steps - 1) for name in EDM_KWARGS},
    "imm/imagenet_256": _row(imm, "imm/imagenet_256", "num_steps", precision="fp16"),
    "imm/cifar10": _row(imm, "imm/cifar10", calls=lambda _: 2, precision="fp16"),
}
# fmt: on
