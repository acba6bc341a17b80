"""Makes the files of the Fashion-MNIST rows: the tokenizer, a VAR trained on its tokens, and redrawn references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_core.distributed import barrier, is_main
from neon_core.seeds import derive_seed
from neon_files.checkpoint import write_checkpoint
from neon_run.fashion.data import NUM_CLASSES, Fashion
from neon_run.fashion.prepare import PrepareFashion
from neon_var.backbone import VARBackbone
from neon_var.fashion.tokenizer import PATCH_NUMS, VAE_KWARGS, train_tokenizer
from neon_var.loading import load_vae
from neon_var.var import VAR

VAR_KWARGS: dict[str, Any] = {
    "vocab_size": VAE_KWARGS["vocab_size"],
    "Cvae": VAE_KWARGS["z_channels"],
    "num_classes": NUM_CLASSES,
    "depth": 3,
    "embed_dim": 64,
    "num_heads": 4,
    "patch_nums": PATCH_NUMS,
}  # 0.25 million parameters


@dataclass(frozen=True)
class PrepareVAR(PrepareFashion):
    """`PrepareFashion` with a tokenizer. References are of redrawn images: what it blurs, no network can mend."""

    tokenizer_steps: int = 1000

    def create(self, folder: Path, fashion: Fashion, seed: int) -> tuple[VARBackbone, dict[str, Path]]:
        """Images are encoded as they are, without official crops."""
        path = folder / "tokenizer.safetensors"
        if is_main() and not path.exists():
            stream = derive_seed("tokenizer", seed)
            vae = train_tokenizer(fashion.train_images, seed=stream, num_steps=self.tokenizer_steps)
            write_checkpoint(path, vae.state_dict(), config={"class": "VQVAE", "kwargs": VAE_KWARGS})
        barrier()
        generator = torch.Generator().manual_seed(derive_seed("initial weights", seed))
        with torch.no_grad():
            net = VAR(**VAR_KWARGS).init_weights(generator)
        return VARBackbone(net, load_vae(path, net), VAR_KWARGS, crop="none"), {"vae_ckpt": path}

    def redraw(self, backbone: VARBackbone, images: Tensor) -> Tensor:
        """Encoded and decoded."""
        return backbone.redraw(images)
