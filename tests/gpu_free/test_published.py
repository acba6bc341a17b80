"""Every published network at full size on a GPU that is not there: the product's own sampling, fine-tune and detector.

Mixed devices and wrong dtypes raise in fake tensors as they would on a card.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from gpu_free.fake_cuda import GIB, GPU, built, fake_cuda
from gpu_free.published import ROWS, edm, training_step

from neon_core.precision import product_layers, weights_as
from neon_metrics.accumulator import MetricAccumulator
from neon_metrics.detector import InceptionDetector
from neon_metrics.inception import InceptionV3
from neon_run.memory import SAMPLING_MEMORY, peak
from neon_xar.xar import build as xar_network

MEMORY = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


@functools.cache
def stated(section: str) -> dict[tuple[str, str], float]:
    """GiB of docs/memory.md per row and precision: the first peak of a line."""
    part = MEMORY.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")] for line in part.splitlines() if line.startswith("| ")]
    return {(cells[1], cells[2]): float(cells[4]) for cells in lines if cells[1] in ROWS}


OFFICIAL = [name for name in ROWS if name not in ("xar/xar_huge", "edm/cifar10_uncond")]
PRECISIONS = [(name, None) for name in OFFICIAL if name != "xar/xar_base"] + [
    (name, precision)
    for name in ("var/imagenet_256", "xar/xar_base", "imm/imagenet_256", "imm/cifar10")
    for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_a_batch_is_sampled_without_waiting_and_in_the_memory_that_is_stated(name, precision):
    row = ROWS[name]
    settings = {row.steps: 3} if row.steps else {}
    with fake_cuda() as record:
        backbone = row.build()
        record.reset()
        images = row.sampling(backbone, **settings, **({"precision": precision} if precision else {}))
        assert (images.dtype, images.device) == (torch.uint8, GPU)
        assert images.shape == (row.batch, 3, backbone.img_size, backbone.img_size)
        assert sum(record.syncs.values()) <= 1  # are the images finite?
        assert record.uploads < 20  # labels and a few tables, not a copy at each step
        parts = [*vars(backbone).values(), getattr(getattr(backbone, "codec", None), "vae", None)]
        networks = [part for part in parts if isinstance(part, torch.nn.Module)]
        assert record.weight_casts <= sum(1 for net in networks for _ in net.parameters())  # each at most once
        used = backbone.precisions(**row.settings | ({"precision": precision} if precision else {}))["network"]
        if precision is None:
            assert record.peak / GIB <= stated("Sampling")[name, used] + 0.05
        known = json.loads(SAMPLING_MEMORY.read_text(encoding="utf-8"))
        entry = known.get(str(sum(p.numel() for p in backbone.net.parameters())), {})
        kind = "fp32" if used == "fp32" else "half"
        if kind in entry:  # what commands compare with the free memory of a GPU
            assert peak(entry[kind], row.batch) == pytest.approx(record.peak / GIB, rel=0.05)


def test_more_steps_convert_no_more_weights():
    row, casts = ROWS["imm/imagenet_256"], []
    with fake_cuda() as record:
        backbone = row.build()
        for steps in (3, 4):
            record.reset()
            row.sampling(backbone, **{row.steps: steps})
            casts.append(record.weight_casts)
    assert casts[0] == casts[1] > 0


def test_a_network_call_of_xar_large_launches_at_most_1100_kernels():
    with fake_cuda() as record, torch.no_grad(), torch.autocast("cuda", torch.float16):
        net = built(xar_network, "xar_large").eval()
        cache = net.new_cache(64)
        cache.length = 3 * net.cell_tokens
        x, condition = torch.zeros(64, net.cell_tokens, 16, device=GPU), torch.zeros(64, 1, 1024, device=GPU)
        with weights_as(torch.float16, product_layers(net)):
            record.reset()
            net.velocity(x, condition, 3, cache)
    assert record.launches <= 1100


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_training_step_runs_in_the_memory_that_is_stated(name):
    row = ROWS[name]
    with fake_cuda() as record:
        run = row.fine_tune(row.build())
        record.reset()
        training_step(run, record)
        # The scaler asks once whether it may step, and so does the check of the gradient where there is none.
        assert set(record.syncs) <= {"number", "copy to the CPU"} and record.syncs["number"] <= 1
        assert record.uploads <= 12  # tables of the first step, and its labels
        assert record.peak / GIB <= stated("Fine-tune")[name, row.row.train.precision] + 0.05
        assert all(p.grad is not None for p in run.backbone.net.parameters())


@pytest.mark.parametrize(
    ("name", "precision"), [("var/imagenet_256", "bf16"), ("xar/xar_base", "fp32"), ("imm/imagenet_256", "fp32")]
)
def test_a_training_step_runs_in_other_precisions(name, precision):
    row = ROWS[name]
    with fake_cuda() as record:
        training_step(row.fine_tune(row.build(), precision), record)


def test_half_precision_of_edm_holds_its_weights_once():
    with fake_cuda() as record:
        backbone, casts = edm("cifar10_cond", use_fp16=True), []
        for steps in (2, 3):
            record.reset()
            backbone.sample(list(range(4)), torch.arange(4), num_steps=steps)
            casts.append(record.weight_casts)
    assert casts[0] == casts[1] > 0


def test_the_detector_and_the_statistics_wait_once_a_batch_and_copy_their_tables_once():
    net = InceptionV3()
    with fake_cuda() as record:
        detector = InceptionDetector(net, "random", official=False, device=GPU)
        accumulator = MetricAccumulator(detector, 96, ("fid", "is"), device=GPU)
        waits = []
        for start in (0, 48):
            images = torch.zeros(48, 3, 64, 64, dtype=torch.uint8, device=GPU)
            record.reset()
            accumulator.update(images, range(start, start + 48))
            waits.append((sum(record.syncs.values()), record.uploads))
    assert waits[1][0] <= 1 and waits[1][1] <= 2
