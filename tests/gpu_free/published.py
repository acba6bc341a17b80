"""Every published network at its full size behind its backbone, on the fake GPU: shapes, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_free.fake_cuda import GPU, Record, built

from neon_core.backbone import Backbone
from neon_core.selftrain import FineTune
from neon_edm.backbone import EDMBackbone
from neon_edm.check import PUBLISHED
from neon_edm.precond import build_network
from neon_run.backbones import backbone_of, find_rows
from neon_run.check.speed import micro_batch
from neon_run.row import Row
from neon_var.architectures import ARCHITECTURES

FOUND = find_rows()


def edm(name: str, use_fp16: bool = False) -> EDMBackbone:
    """With the flag of the pickles that compute in float16 on GPUs."""
    kwargs = PUBLISHED[name] | {"use_fp16": use_fp16}
    net = built(build_network, "EDMPrecond", kwargs, memory_format=torch.channels_last)
    return EDMBackbone(net, {"class": "EDMPrecond", "kwargs": kwargs}, GPU)


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
    backbone = run.backbone
    batch = micro_batch(backbone, (3, backbone.img_size, backbone.img_size), run.settings.micro_batch_size, GPU)
    record.leaves(backbone.net.parameters())
    run.step([batch])


def _row(id: str, steps: str = "", calls=lambda steps: steps, **more) -> Published:
    row = FOUND[id]
    untrained = backbone_of(row).machine_check.untrained
    return Published(row, lambda: untrained(row, GPU, built), {**row.evaluate, **more}, steps, calls)


def _var_row(name: str) -> Published:
    return _row(f"var/{name}", calls=lambda _: len(ARCHITECTURES[name].patch_nums))


# fmt: off
ROWS: dict[str, Published] = {
    "var/imagenet_256": _var_row("imagenet_256"),
    "var/imagenet_512": _var_row("imagenet_512"),
    **{f"xar/{name}": _row(f"xar/{name}", "flow_steps", lambda steps: 4 * steps)
       for name in ("xar_base", "xar_large", "xar_huge")},
    **{f"edm/{name}": _row(f"edm/{name}", "num_steps", lambda steps: 2 * steps - 1) for name in PUBLISHED},
    "imm/imagenet_256": _row("imm/imagenet_256", "num_steps", precision="fp16"),
    "imm/cifar10": _row("imm/cifar10", calls=lambda _: 2, precision="fp16"),
}
# fmt: on
