"""The short fine-tune on the synthetic set: theta_base, S -> theta_syn. One loop for all backbones.

A step of `batch_size` images is cut into micro batches of fixed size, which are dealt to any number of ranks; each has
its own random stream, derived from (seed, step, micro batch). So the number of ranks changes sums by rounding only, and
a run that was killed continues with the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neon_core import parallel
from neon_core.backbone import Backbone, TrainSettings
from neon_core.distributed import agree, all_reduce_, barrier, broadcast_object, is_main, largest, world_size
from neon_core.precision import autocast
from neon_core.prepared import TrainingData
from neon_core.seeds import derive_seed
from neon_files.atomic import atomic_path
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_files.finetune_folder import claim, earlier_lines, find_snapshots, snapshot_path
from neon_files.progress import progress_bar
from neon_files.run_files import intact, one_run, read_tensors, set_aside
from neon_files.stopping import Stopped, signals_wait
from neon_files.tracking import track

MicroBatch = tuple[Tensor, Tensor | None, torch.Generator]  # encoded images, labels, random stream
OPTIMIZERS = {  # one kernel for all parameters where there is one
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "radam": (torch.optim.RAdam, {}),
}


class FineTune:
    """The moving parts of a fine-tune: `net` in train mode, its optimizer, its average, the images seen so far."""

    def __init__(
        self,
        backbone: Backbone,
        settings: TrainSettings,
        device: torch.device,
        *,
        mode: str = "ddp",
        activation_checkpointing: bool = False,
    ):
        self.backbone, self.settings, self.device = backbone, settings, device
        self.images_seen = 0
        self.gradient_norm: Tensor | None = None  # of the last step, where it is computed
        backbone.net.train().requires_grad_(True)
        if activation_checkpointing:
            parallel.checkpoint_activations(backbone.blocks())
        if mode == "fsdp":
            parallel.shard(backbone.net, backbone.blocks())
        self.ema = [p.detach().clone() for p in backbone.net.parameters()] if settings.ema else None
        make, extra = OPTIMIZERS[settings.optimizer]
        self.optimizer = make(
            backbone.parameter_groups(settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            **extra,
        )
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=settings.scaler_init,
            growth_interval=settings.scaler_growth_interval,
            enabled=settings.precision == "fp16",
        )
        loss = _Loss(backbone)
        self._loss = parallel.replicate(loss, backbone.unused_parameters) if mode == "ddp" else loss

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.settings.lr * self.settings.schedule(self.images_seen)

    @property
    def must_be_finite(self) -> bool:
        """Whether losses and gradients that are not finite are an error (the scaler skips such steps of fp16)."""
        return self.settings.nonfinite_gradients == "raise" and not self.scaler.is_enabled()

    def step(self, micro_batches: Sequence[MicroBatch], count: int | None = None) -> Tensor:
        """One optimizer step over this rank's share of the batch: those that `parallel.dealt(count)` numbers.

        Returns this rank's part of the mean loss, times the number of ranks: a scalar on the device, which nothing
        here waits for. `count` is the number of micro batches over all ranks, by default as many on each.
        """
        settings = self.settings
        count = count or len(micro_batches) * world_size()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros([], device=self.device)
        numbers = parallel.dealt(count)
        for number, (x, labels, generator) in zip(numbers, micro_batches, strict=True):
            ddp = self._loss if isinstance(self._loss, DistributedDataParallel) else None
            with ddp.no_sync() if ddp and number != numbers[-1] else nullcontext(), deterministic_dropout(generator):
                # the gradient is averaged over ranks, so the sum over all ranks is the mean over the batch
                loss = self._loss(x, labels, generator, settings.precision) / (count / world_size()) * (number < count)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self._condition_gradients()
        self.scaler.step(self.optimizer)
        too_large = settings.scaler_max is not None and self.scaler.get_scale() > settings.scaler_max
        self.scaler.update(settings.scaler_max if too_large and self.scaler.is_enabled() else None)
        self._average()
        self.images_seen += settings.batch_size
        return total

    def _condition_gradients(self) -> None:
        settings = self.settings
        parameters = [p for p in self.backbone.net.parameters() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        if settings.nonfinite_gradients == "zero":
            for gradient in [p.grad for p in parameters if p.grad is not None]:
                gradient.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        if settings.clip_norm is not None or self.must_be_finite:
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
            self.gradient_norm = parallel.whole(norm)

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.settings.ema is None:
            return
        beta = self.settings.ema.beta(self.images_seen, self.settings.batch_size)
        parameters = [p.detach() for p in self.backbone.net.parameters()]
        torch._foreach_mul_(self.ema, beta)
        torch._foreach_add_(self.ema, parameters, alpha=1.0 - beta)

    def theta_syn(self) -> dict[str, Tensor]:
        """The fine-tuned weights under their published names, on rank 0: the average if there is one, with the net's
        buffers. A collective."""
        state = parallel.network_state(self.backbone.net)
        if self.ema is not None:
            for (name, _), value in zip(self.backbone.net.named_parameters(), self.ema, strict=True):
                state[name] = parallel.on_rank_0(value)
        return state

    def state_dict(self) -> dict:
        """Everything to continue from, in full tensors on rank 0: a run may go on with other ranks or another mode.
        A collective."""
        return {
            "images_seen": self.images_seen,
            "net": parallel.network_state(self.backbone.net),
            "ema": None if self.ema is None else [parallel.on_rank_0(value) for value in self.ema],
            "optimizer": parallel.optimizer_state(self.backbone.net, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.images_seen = state["images_seen"]
        parallel.load_network_state(self.backbone.net, state["net"])
        parallel.load_optimizer_state(self.backbone.net, self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema = [parallel.like(new, old) for new, old in zip(state["ema"], self.ema, strict=True)]


def snapshot_plan(settings: TrainSettings) -> list[int]:
    """Images seen at each snapshot: the first step end at or past every multiple (or listed count), and the end."""
    end = math.ceil(settings.images / settings.batch_size) * settings.batch_size
    if isinstance(settings.snapshot_images, int):
        counts: Iterable[int] = range(settings.snapshot_images, settings.images, settings.snapshot_images)
    else:
        counts = settings.snapshot_images
    ends = {math.ceil(n / settings.batch_size) * settings.batch_size for n in counts}
    return sorted({n for n in ends if n <= end} | {end})


def check_sizes(settings: TrainSettings) -> None:
    """UserError where the micro batches do not fill the batch, with the nearest sizes that do."""
    batch, micro = settings.batch_size, settings.micro_batch_size
    if not 0 < micro <= batch or batch % micro:  # never replaced in silence: the random numbers depend on it
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        nearest = sorted({max((n for n in divisors if n < micro), default=1), *[n for n in divisors if n > micro][:1]})
        raise UserError(
            f"--micro_batch_size {micro} does not divide the batch size {batch}; use {' or '.join(map(str, nearest))}"
        )


@dataclass(frozen=True)
class RunOptions:
    """The execution of a fine-tune; `TrainSettings` determines its numbers."""

    seed: int = 0  # of the order of the images and of all random numbers
    mode: str = "ddp"  # ddp | fsdp: replicated or sharded over ranks
    activation_checkpointing: bool = False  # less memory, more time
    state_minutes: float = 10.0  # between two states to continue from
    progress: bool = True
    name: str = "fine-tune"  # of the training, where its progress is shown


def self_train(
    backbone: Backbone,
    data: TrainingData,
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    device: torch.device,
    provenance: dict | None = None,
    **options: Any,
) -> dict[int, Path]:
    """Fine-tune `backbone` in place and write its snapshots; an earlier run in `out_dir` is continued.

    Returns images seen -> snapshot. Files: `settings.json`, `log.jsonl` (a line per step), `state.pt` (to continue
    from: at every snapshot and every `state_minutes`), `snapshot-<images>.safetensors`. Every rank calls it. Raises
    UserError where the folder holds a run with other settings, the sizes do not divide, or the loss or its gradient is
    not finite; Stopped, with the state written, after a signal. `options` are the fields of `RunOptions`. Afterwards
    the backbone holds the raw fine-tuned weights.
    """
    out_dir, how = Path(out_dir), RunOptions(**options)
    check_sizes(settings)
    identity = {
        "settings": dataclasses.asdict(settings),
        "seed": how.seed,
        "num_items": data.num_items,
        **(provenance or {}),
    }
    identity = json.loads(json.dumps(identity, default=str))
    with one_run(out_dir) if is_main() else nullcontext():
        if is_main():
            claim(out_dir, identity)
        barrier()
        plan = snapshot_plan(settings)
        missing = broadcast_object([n for n in plan if not snapshot_path(out_dir, n).exists()])
        if missing:
            run = FineTune(
                backbone, settings, device, mode=how.mode, activation_checkpointing=how.activation_checkpointing
            )
            loop = _Loop(run, out_dir, identity, missing, how)
            loop.resume()
            loop.train(data)
            parallel.keep_activations(backbone.blocks())
            backbone.net.eval().requires_grad_(False)
        if is_main():
            (out_dir / "state.pt").unlink(missing_ok=True)
        barrier()
    return agree(out_dir, lambda: find_snapshots(out_dir), list)


@dataclass
class _Loop:
    """The steps up to the last missing snapshot, and the files that they write."""

    run: FineTune
    out_dir: Path
    identity: dict
    missing: list[int]  # images seen at the snapshots to be written
    how: RunOptions

    def resume(self) -> None:
        """Continue from an earlier run's state and log. A state past a missing snapshot is not used."""
        path = self.out_dir / "state.pt"
        if is_main() and path.exists():
            state = intact(path, read_tensors, mmap=True)
            if state is not None and not _is_state_before(state, self.missing[0]):
                set_aside(path, f"not a state before {self.missing[0]} images")
        barrier()
        if agree(path, path.exists):
            self.run.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        path = self.out_dir / "log.jsonl"
        self.log = StepLog(path, self.run.images_seen, self.missing[-1], self.run.must_be_finite, self.how.name)

    def train(self, data: TrainingData) -> None:
        run, settings, end, how = self.run, self.run.settings, self.missing[-1], self.how
        show: dict[str, Any] = {"desc": how.name, "unit": "img", "disable": not (how.progress and is_main())}
        steps = range(run.images_seen // settings.batch_size, end // settings.batch_size)
        saved_at = time.monotonic()
        with progress_bar(total=end, initial=run.images_seen, **show) as bar, signals_wait() as stop_asked:
            for step, micro_batches in _prefetched(run, data, steps, how.seed):
                # the step
                lr = run.lr
                loss = run.step(micro_batches, settings.batch_size // settings.micro_batch_size)
                self.log.add(run.images_seen, lr, loss, run.gradient_norm)
                bar.update(settings.batch_size)

                # the decisions of all ranks: the hosts agree, waiting for no device
                stop, late = largest(stop_asked(), time.monotonic() - saved_at > 60 * how.state_minutes)
                at_snapshot = run.images_seen in self.missing
                write_state = (stop or late or at_snapshot) and run.images_seen < end

                # the files: the log first, which also refuses numbers that are not finite
                if at_snapshot or write_state or step % 16 == 0:
                    bar.set_postfix(loss=f"{self.log.settle():.4g}", refresh=False)
                if at_snapshot:
                    self._write_snapshot()
                if write_state:
                    self._write_state()
                    saved_at = time.monotonic()
                if stop and run.images_seen < end:
                    raise Stopped(stop)

    def _write_snapshot(self) -> None:
        run, state = self.run, self.run.theta_syn()
        if is_main():
            metadata = {**self.identity, "images_seen": run.images_seen}
            path = snapshot_path(self.out_dir, run.images_seen)
            write_checkpoint(path, state, config=run.backbone.network_config(), metadata=metadata)
        barrier()

    def _write_state(self) -> None:
        state = self.run.state_dict()
        if is_main():
            with atomic_path(self.out_dir / "state.pt") as temporary:
                torch.save(state, temporary)
        barrier()


def _is_state_before(state: object, images: int) -> bool:
    parts = {"images_seen", "net", "ema", "optimizer", "scaler"}
    return isinstance(state, dict) and parts <= state.keys() and state["images_seen"] < images


class _Loss(nn.Module):
    """The backbone's loss as a module, so that DistributedDataParallel sees its parameters."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.net = backbone.net
        self.loss = backbone.self_training_loss

    def forward(self, x: Tensor, labels: Tensor | None, generator: torch.Generator, precision: str) -> Tensor:
        with autocast(x.device, precision):
            return self.loss(x, labels, generator)


def _prefetched(run: FineTune, data: TrainingData, steps: range, seed: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this rank's micro batches); files of the next step are read while this one trains."""
    backbone, settings, device = run.backbone, run.settings, run.device
    count = settings.batch_size // settings.micro_batch_size
    batches = islice(backbone.data_order(data.num_items, settings.batch_size, seed), steps.start, None)

    def read(indices: np.ndarray) -> list[tuple[Any, ...]]:  # number, images, labels or None
        parts = np.split(indices, count)
        return [(m % count, *map(to_pinned, data.batch(parts[m % count]))) for m in parallel.dealt(count)]

    def to_pinned(tensor: Tensor | None) -> Tensor | None:  # unpinned memory is copied while the device waits
        return tensor.pin_memory() if tensor is not None and device.type == "cuda" else tensor

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(read, next(batches)) if len(steps) else None
        for step in steps:
            assert upcoming is not None
            parts = upcoming.result()
            upcoming = reader.submit(read, next(batches)) if step + 1 < steps.stop else None
            micro_batches = []
            for number, prepared, labels in parts:
                generator = torch.Generator(device).manual_seed(derive_seed("micro batch", seed, step, number))
                with torch.no_grad():
                    x = backbone.encode(prepared.to(device, non_blocking=True), generator)
                labels = None if labels is None else labels.to(device, non_blocking=True)
                micro_batches.append((x, labels, generator))
            yield step, micro_batches


class deterministic_dropout:
    """Dropout draws from the default generator, which takes no generator argument: seed it from the micro batch's
    stream, and restore its state afterwards."""

    def __init__(self, generator: torch.Generator):
        self.seed = derive_seed("dropout", generator.initial_seed())
        self.devices = [generator.device] if generator.device.type == "cuda" else []

    def __enter__(self):
        self._fork = torch.random.fork_rng(self.devices)
        self._fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self._fork.__exit__(*error)


class StepLog:
    """`log.jsonl`, a line per step. Losses stay on the device until `settle`, so that no step waits for them."""

    def __init__(self, path: Path, images_seen: int, end: int, must_be_finite: bool, name: str = "fine-tune"):
        self.path, self.must_be_finite, self.name = path, must_be_finite, name
        self.lines, self.behind = earlier_lines(path, images_seen, end) if is_main() else ([], [])
        self.open: list[tuple[int, float, Tensor, Tensor]] = []  # images seen, lr, loss, gradient norm

    def add(self, images: int, lr: float, loss: Tensor, norm: Tensor | None) -> None:
        """A step: images seen after it, its learning rate, and the numbers that `settle` reads from the device."""
        self.open.append((images, lr, loss, loss.new_zeros([]) if norm is None else norm))

    def settle(self) -> float:
        """Write the lines of all steps so far, on rank 0; the last loss. A collective. Raises UserError where a loss
        or a gradient is not finite and must be."""
        losses = all_reduce_(torch.stack([loss for _, _, loss, _ in self.open])).tolist()
        norms = torch.stack([norm for *_, norm in self.open]).tolist()
        for (images, lr, *_), loss, norm in zip(self.open, losses, norms, strict=True):
            loss /= world_size()
            if self.must_be_finite and not (math.isfinite(loss) and math.isfinite(norm)):
                part = "gradient" if math.isfinite(loss) else "loss"
                raise UserError(
                    f"the {part} is not finite in the step up to {images} images; lower the learning rate, or use "
                    "--precision fp32"
                )
            self.lines.append(json.dumps({"images": images, "loss": loss, "lr": lr}))
            track({f"{self.name}/loss": loss, f"{self.name}/lr": lr}, images)
        self.open = []
        if is_main():
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in self.lines + self.behind), encoding="utf-8")
        return loss
