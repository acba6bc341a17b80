#!/usr/bin/env python3
"""FID of a network's images; nothing is written but the result line (and --json).

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz --seeds 0-49999 --num_steps 40

Also without torchrun, in one process. Every seed counts once, whatever the number of processes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]  # neon_edm, neon_core: run without installing

import click

from neon_core.distributed import file_hash, session
from neon_core.precision import float32_precision
from neon_edm import options as o
from neon_edm.backbone import EDMBackbone
from neon_edm.report import result_line
from neon_files.downloads import fetch
from neon_metrics.evaluate import Evaluator
from neon_run.cli import batch_option, device_option, json_option, metric_options, run, work_options, write_result


@click.command(**o.SETTINGS)
@o.network_option()
@metric_options("fid")
@o.seeds_option("0-9999", "One image each.")
@batch_option
@o.sampler_options
@work_options
@o.tf32_option
@device_option
@json_option
def main(
    network, reference, metrics, real_images, detector, seeds, batch_size, work_dir, save_images, tf32, device,
    json_path, **flags,
) -> None:  # fmt: skip
    """Sample, extract features, compare with the reference."""
    settings = o.sampler_settings(flags)
    with session(device) as where, float32_precision(tf32):
        evaluator = Evaluator(reference, device=where, metrics=metrics, detector=detector, real_images=real_images)
        path = fetch(network)
        backbone = EDMBackbone.load(path, None, where)
        identity = {"sha256": file_hash(path)}
        options = {"work_dir": work_dir, "identity": identity, "save_images": save_images}
        result = evaluator(backbone, seeds, settings=settings, batch_size=batch_size, **options)
        result |= {"network": str(path), "network_sha256": identity["sha256"], "tf32": tf32}
        write_result(result, result_line(result, backbone.num_classes), json_path)
        evaluator.clear()


if __name__ == "__main__":
    run(main)
