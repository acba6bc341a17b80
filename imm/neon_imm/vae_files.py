"""Finding and reading the frozen autoencoder: a folder, a file, or a repository of the model hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from neon_core.kl_vae import AutoencoderKL, to_ldm_names
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_files.home import download_command, home

SD_VAE = "stabilityai/sd-vae-ft-ema"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors")

DEFAULT_VAE = home() / "checkpoints" / "sd-vae-ft-ema" / WEIGHT_FILES[0]  # as download_models.sh puts it

# The Stability VAE (ft-mse and ft-ema alike), for files that come without a configuration.
SD_VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
}


def load_vae(source: str | Path | None = None) -> AutoencoderKL:
    """The autoencoder at `source`, on the CPU, in eval mode and without gradients.

    `source` is a diffusers folder (config.json beside the weights), one weight file, or a hub repository (SD_VAE);
    `checkpoints/<last part of the name>`, in the current folder or in `home()`, is preferred to a download. Names of
    latent diffusion and both of diffusers are read. Raises UserError where there is none, or the hub cannot be reached.
    """
    weights, config = locate_vae(source)
    checkpoint = read_checkpoint(weights)
    if config is not None:
        vae = AutoencoderKL.from_diffusers_config(config)
    elif checkpoint.config is not None and checkpoint.config.get("class") == "AutoencoderKL":
        vae = AutoencoderKL(**checkpoint.config["kwargs"])
    else:
        vae = AutoencoderKL.from_diffusers_config(SD_VAE_CONFIG)
    # Stability's .ckpt files hold training leftovers beside the autoencoder.
    state = {k: v for k, v in checkpoint.state.items() if not k.startswith(("loss.", "model_ema."))}
    load_strict(vae, dataclasses.replace(checkpoint, state=to_ldm_names(state)))
    return vae.float().eval().requires_grad_(False)


def save_vae(path: str | Path, vae: AutoencoderKL) -> None:
    """One file that `load_vae` reads back, configuration included."""
    write_checkpoint(path, vae.state_dict(), config={"class": "AutoencoderKL", "kwargs": vae.config}, metadata={})


def locate_vae(source: str | Path | None = None) -> tuple[Path, dict | None]:
    """(weight file, diffusers config or None), fetched if missing, but not read. Raises UserError."""
    source = str(source or SD_VAE)
    name = source.rstrip("/").split("/")[-1]
    places = [Path(source), *(folder / "checkpoints" / name for folder in (Path(), home()))]
    local = next((place for place in places if place.exists()), places[-1])
    if local.is_file():
        config = local.with_name(CONFIG_FILE)
        return local, _read_config(config) if config.is_file() and local.name in WEIGHT_FILES else None
    if local.is_dir():
        for name in WEIGHT_FILES:
            if (local / name).is_file():
                return local / name, _read_config(local / CONFIG_FILE)
        raise UserError(f"{local}: no VAE weights in it; expected {CONFIG_FILE} and one of {', '.join(WEIGHT_FILES)}")
    if (
        source.count("/") != 1
        or source.startswith((".", "/"))
        or Path(source).suffix in (".pt", ".ckpt", ".safetensors")
    ):
        raise UserError(f"--vae {source}: no such file or folder; name one, or a hub repository like {SD_VAE}")
    return _fetch(source)


def _fetch(repository: str) -> tuple[Path, dict]:
    """Both files from the hub, or from its cache. One rank of a node downloads, the others wait for its lock."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = huggingface_hub.hf_hub_download(repository, CONFIG_FILE)
        try:
            weights = huggingface_hub.hf_hub_download(repository, WEIGHT_FILES[0])
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            weights = huggingface_hub.hf_hub_download(repository, WEIGHT_FILES[1])
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"the VAE {repository} is neither under checkpoints/{repository.split('/')[-1]}/ nor in the hub's cache, "
            f"and cannot be fetched now ({type(error).__name__}); where there is a network, run "
            f"`{download_command('imm')}`, or name a folder with its config.json and weights as --vae"
        ) from error
    return Path(weights), _read_config(Path(config))


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["block_out_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a diffusers autoencoder configuration; fetch the VAE again") from error
    return config
