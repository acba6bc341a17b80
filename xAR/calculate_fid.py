#!/usr/bin/env python3
"""FID and IS of an xAR checkpoint; images stay in memory, one result line comes out (and --json).

    PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model xar_large \\
        --model_ckpt checkpoints/Neon_xARL_imagenet256.pth --cfg 2.7 --vae_path xAR/pretrained/kl16.ckpt \\
        --num_images 50000 --batch_size 64 --flow_steps 50 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

Without --cfg and --flow_steps: the paper's settings of the row (xar_large 2.7 and 50, xar_base 3.8 and 40). Every image
counts once, whatever the number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_xar, neon_core: run without installing

import click

from neon_core.distributed import file_hash, print0, session
from neon_core.precision import float32_precision
from neon_files.checkpoint import find_file
from neon_metrics.evaluate import Evaluator
from neon_run.cli import batch_option, device_option, json_option, run, work_options, write_result
from neon_xar import options as o
from neon_xar.backbone import XARBackbone
from neon_xar.evaluate import check_model, result_line
from neon_xar.recipes import RECIPES


@click.command(**o.SETTINGS)
@o.model_option(required=True)
@click.option("--model_ckpt", type=o.FILE, required=True, help="xAR checkpoint: base, fine-tuned or merged.")
@o.vae_option(required=True)
@o.seeds_options(50_000, default_seed=1)
@batch_option
@o.sampler_options
@o.metric_options
@work_options
@click.option("--out_dir", help="Official folder of temporary images; nothing is written to it or removed from it.")
@o.official_options
@o.compile_option
@o.tf32_option
@device_option
@json_option
def main(
    model, model_ckpt, vae_path, num_images, seed, seeds, batch_size, reference, no_isc, metrics, real_images, detector,
    work_dir, save_images, out_dir, img_size, class_num, cuda, dist_url, dist_on_itp, world_size, local_rank, compiled,
    tf32, device, json_path, **flags,
) -> None:  # fmt: skip
    """Sample, extract features, compare with the reference."""
    recipe = RECIPES[model]
    settings = o.sampler_settings(flags, recipe.evaluate)
    chosen = o.chosen_seeds(num_images, seed, seeds)
    metrics = tuple(name for name in metrics if not (no_isc and name == "is"))
    with session(device) as where, float32_precision(tf32):
        if (settings["cfg"], settings["flow_steps"]) != tuple(recipe.evaluate.values()):
            ours = " and ".join(f"--{name} {value}" for name, value in recipe.evaluate.items())
            print0(f"note: the paper's settings of {model} are {ours}", file=sys.stderr)
        checkpoint = XARBackbone.find("--model_ckpt", model_ckpt, model)
        vae_path = XARBackbone.find("--vae_path", vae_path, model)
        evaluator = Evaluator(
            reference or recipe.fid_stats, device=where, metrics=metrics, detector=detector, real_images=real_images
        )
        backbone = XARBackbone.load(checkpoint, recipe, where, vae_path=vae_path, model=model, compiled=compiled)
        check_model(backbone, img_size, class_num)
        identity = {"sha256": file_hash(checkpoint), "vae_sha256": file_hash(find_file(vae_path))}
        kept = {"work_dir": work_dir, "identity": identity, "save_images": save_images}
        result = evaluator(backbone, chosen, settings=settings, batch_size=batch_size, **kept)
        result |= {
            "model": model,
            "checkpoint": checkpoint.stem,
            "paper_settings": recipe.evaluate,
            "tf32": tf32,
            **identity,
        }
        write_result(result, result_line(result), json_path)
        evaluator.clear()


if __name__ == "__main__":
    run(main)
