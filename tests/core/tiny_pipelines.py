"""diffusers pipelines of a few thousand weights, of every kind that `neon improve` knows."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers

UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip
TEXT_UNET = {
    "sample_size": 4, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4, "cross_attention_dim": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "out_channels": 4, "num_layers": 1,
    "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (4, 8), "latent_channels": 2, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 8,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def seeded(make, **settings):
    """A network with the same weights in every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make(**settings).eval()


def unet(**changes):
    return seeded(diffusers.UNet2DModel, **{**UNET, **changes})


def text_unet(**changes):
    return seeded(diffusers.UNet2DConditionModel, **{**TEXT_UNET, **changes})


def vae():
    return seeded(diffusers.AutoencoderKL, **VAE)


def dit_pipeline(scheduler=None, **changes):
    scheduler = scheduler or diffusers.DDIMScheduler(num_train_timesteps=50)
    return diffusers.DiTPipeline(seeded(diffusers.DiTTransformer2DModel, **{**DIT, **changes}), vae(), scheduler)


def text_pipeline(folder: Path, scheduler=None, **changes):
    """A StableDiffusionPipeline whose tokenizer knows letters; `folder`: for the tokenizer's files."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    tokenizer = transformers.CLIPTokenizer(*files, model_max_length=8)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=0,
    )  # fmt: skip
    scheduler = scheduler or diffusers.DDIMScheduler(num_train_timesteps=50, steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=seeded(transformers.CLIPTextModel, config=config), tokenizer=tokenizer,
        unet=text_unet(**changes), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
