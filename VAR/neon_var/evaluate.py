"""FID of a VAR checkpoint: what the two calculate_fid.py call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from neon_core.distributed import file_hash, print0, session
from neon_core.precision import float32_precision
from neon_metrics.evaluate import Evaluator
from neon_run.cli import device_option, json_option, measured_line, metric_options, run, work_options, write_result
from neon_var.backbone import VARBackbone
from neon_var.options import (
    BATCH_SIZE,
    FILE,
    SETTINGS,
    batch_option,
    check_files,
    check_img_size,
    model_options,
    sampler_options,
    sampler_settings,
)
from neon_var.recipes import ARCHITECTURES, RECIPES


def result_line(result: dict[str, Any]) -> str:
    """One line in the official layout; what else was measured behind it."""
    parts = [f"cfg={result['settings']['cfg']:g}", f"N={result['num_images']}", f"depth={result['depth']}"]
    return measured_line(result, [*parts, f"ckpt={Path(result['checkpoint']).stem}"])


def calculate_fid(preset: str) -> None:
    """The command of VAR/VAR_<preset>/calculate_fid.py."""
    recipe = RECIPES[preset]
    cfg = recipe.evaluate["cfg"]

    @click.command(**SETTINGS)
    @click.option("--var_ckpt", type=FILE, required=True, help="VAR checkpoint: base, fine-tuned or merged.")
    @model_options
    @click.option(
        "--num_images", "--N", "num_images", type=click.IntRange(2), default=50_000, show_default=True, help="How many."
    )
    @batch_option
    @click.option("--img_size", type=int, help="Side in pixels; only checked.")
    @click.option("--cfg", type=float, default=cfg, show_default=True, help="Guidance at the last scale.")
    @sampler_options
    @click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds are seed, seed+1, ...")
    @metric_options("fid,is", recipe.fid_stats)
    @work_options
    @click.option("--temp_dir", hidden=True, help="Official. Not used: images stay in memory.")
    @device_option
    @json_option
    def command(
        var_ckpt, vae_ckpt, model_depth, compiled, num_images, batch_size, img_size, seed, reference, metrics,
        real_images, detector, work_dir, save_images, temp_dir, device, json_path, **flags,
    ) -> None:  # fmt: skip
        """Sample, extract features, compare with the reference; prints one result line."""
        if img_size in [architecture.img_size for architecture in ARCHITECTURES.values()]:
            check_img_size(img_size, ARCHITECTURES[preset].img_size)  # before anything is loaded
        settings = sampler_settings(flags, dict(recipe.evaluate))
        with session(device) as where, float32_precision(allow_tf32=True):
            checkpoint, vae = check_files(var_ckpt, vae_ckpt)
            if temp_dir:
                print0(
                    f"--temp_dir {temp_dir}: not used, images stay in memory (--save_images keeps them)",
                    file=sys.stderr,
                )
            evaluator = Evaluator(reference, device=where, metrics=metrics, detector=detector, real_images=real_images)
            backbone = VARBackbone.load(
                checkpoint, recipe, where, vae_ckpt=vae, model_depth=model_depth, compiled=compiled
            )
            check_img_size(img_size, backbone.img_size)
            backbone.check_settings(**settings)
            identity = {"checkpoint_sha256": file_hash(checkpoint), "vae_sha256": file_hash(vae)}
            result = evaluator(
                backbone,
                range(seed, seed + num_images),
                settings=settings,
                batch_size=batch_size or BATCH_SIZE[preset],
                work_dir=work_dir,
                identity=identity,
                save_images=save_images,
            )
            result |= identity | {"checkpoint": str(checkpoint), "depth": backbone.net.depth, "preset": preset}
            write_result(result, result_line(result), json_path)
            evaluator.clear()

    run(command)
