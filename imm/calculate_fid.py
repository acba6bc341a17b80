#!/usr/bin/env python3
"""FID and IS of an IMM checkpoint; nothing is written but the result line (and --json).

    PYTHONPATH=imm torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py \\
        --model_ckpt checkpoints/Neon_IMM_imagenet256.pth --num_images 50000 --batch_size 64 --img_size 256 \\
        --fid_stats fid_stats/adm_in256_stats.npz

With --synthetic and --w, of theta_base - w (theta_syn - theta_base). The official script's key=value pairs work too.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_imm, neon_core: run without installing

import click

from neon_core.distributed import session
from neon_core.precision import float32_precision
from neon_files.checkpoint import find_file
from neon_files.errors import UserError
from neon_imm import options as o
from neon_imm.evaluate import evaluate, load_backbone, merge_in_place, result_line
from neon_metrics.evaluate import Evaluator
from neon_run.cli import batch_option, json_option, metric_options, run, work_options, write_result


@click.command(**o.SETTINGS)
@o.preset_option
@click.option(
    "--model_ckpt", "--network_pkl", "--network", "model_ckpt", required=True, type=o.FILE, help="Checkpoint."
)
@click.option("--synthetic", "--aux_resume", "synthetic", type=o.FILE, help="theta_syn, to merge --model_ckpt with.")
@click.option("--w", "--neon_w", "w", type=float, help="Merge weight of --synthetic.  [default: the preset's]")
@o.seed_options
@batch_option
@click.option("--img_size", type=o.COUNT, help="Checked against the checkpoint.")
@o.sampling_options
@metric_options("fid,is", "")
@work_options
@o.model_options
@json_option
def main(
    preset, model_ckpt, synthetic, w, num_images, per_class_count, seeds, batch_size, img_size, reference, metrics,
    real_images, detector, work_dir, save_images, vae, compiled, device, json_path, **flags,
) -> None:  # fmt: skip
    """Sample (8 steps, guidance 1.8, if not said otherwise), extract features, compare with the reference."""
    recipe = o.row(preset)
    settings = o.sampling_settings(preset, recipe.evaluate, flags)
    with session(device) as where, float32_precision(allow_tf32=True):
        if w is not None and synthetic is None:
            raise UserError("--w: needs --synthetic, the fine-tuned checkpoint to step away from")
        files = {"checkpoint": find_file(model_ckpt)} | ({"synthetic": find_file(synthetic)} if synthetic else {})
        evaluator = Evaluator(
            reference or recipe.fid_stats, device=where, metrics=metrics, detector=detector, real_images=real_images
        )
        backbone = load_backbone(files["checkpoint"], recipe, where, vae, compiled, img_size)
        seeds = o.chosen_seeds(50_000, backbone.num_classes, num_images, per_class_count, seeds)
        if synthetic is not None:
            w = recipe.w if w is None else w
            merge_in_place(backbone, files["synthetic"], w)
        options = {"batch_size": batch_size, "work_dir": work_dir, "save_images": save_images}
        result = evaluate(backbone, evaluator, seeds, settings, files=files, w=w, **options)
        write_result(result, result_line(result), json_path)
        evaluator.clear()


if __name__ == "__main__":
    try:
        sys.argv[1:] = o.official_arguments(sys.argv[1:])
    except UserError as error:
        error.show()
        sys.exit(error.exit_code)
    run(main)
