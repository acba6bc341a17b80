"""The short fine-tune on the synthetic set: theta_base, S -> theta_syn. One loop for all backbones.

A step of `batch_size` images is cut into micro batches of fixed size, which are dealt to the ranks; each has its own
random stream, derived from (seed, step, micro batch). So the number of ranks changes sums by rounding only, and a run
that was killed continues as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from neon_core import parallel
from neon_core.backbone import Backbone, TrainSettings
from neon_core.distributed import all_reduce_, barrier, broadcast_object, is_main, rank, world_size
from neon_core.prepared import TrainingData
from neon_core.seeds import derive_seed
from neon_files.atomic import atomic_path
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError

MicroBatch = tuple[Tensor, Tensor | None, torch.Generator]  # encoded images, labels, random stream
OPTIMIZERS = {  # one kernel for all parameters where there is one
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "radam": (torch.optim.RAdam, {}),
}
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


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

    def step(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """One optimizer step over this rank's share of the batch; every rank has equally many micro batches.

        Returns the mean loss of this rank's share, a scalar on the device. Raises UserError where the gradient is
        not finite and `nonfinite_gradients` is "raise" (fp16 steps are skipped by the scaler instead).
        """
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros([], device=self.device)
        for number, (x, labels, generator) in enumerate(micro_batches, start=1):
            wait = number < len(micro_batches) and isinstance(self._loss, DistributedDataParallel)
            with self._loss.no_sync() if wait else nullcontext(), _deterministic_dropout(generator):
                loss = self._loss(x, labels, generator, settings.precision) / len(micro_batches)
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
            for parameter in parameters:
                parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        must_be_finite = settings.nonfinite_gradients == "raise" and not self.scaler.is_enabled()
        if settings.clip_norm is not None or must_be_finite:
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
            if must_be_finite and not torch.isfinite(parallel.whole(norm)):
                raise UserError(
                    f"the gradient is not finite after {self.images_seen} images; lower the learning rate, or use "
                    "--precision fp32"
                )

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        beta = self.settings.ema.beta(self.images_seen, self.settings.batch_size)
        parameters = [p.detach() for p in self.backbone.net.parameters()]
        torch._foreach_mul_(self.ema, beta)
        torch._foreach_add_(self.ema, parameters, alpha=1.0 - beta)

    def theta_syn(self) -> dict[str, Tensor]:
        """The fine-tuned weights under their published names: the average if there is one, with the net's buffers.
        A collective where the network is sharded."""
        state = parallel.network_state(self.backbone.net)
        if self.ema is not None:
            for (name, _), value in zip(self.backbone.net.named_parameters(), self.ema, strict=True):
                state[name] = parallel.whole(value)
        return state

    def state_dict(self) -> dict:
        """Everything to continue from, in full tensors: a run may go on with other ranks or another mode."""
        return {
            "images_seen": self.images_seen,
            "net": parallel.network_state(self.backbone.net),
            "ema": None if self.ema is None else [parallel.whole(value) for value in self.ema],
            "optimizer": parallel.optimizer_state(self.backbone.net, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.images_seen = state["images_seen"]
        parallel.load_network_state(self.backbone.net, state["net"])
        parallel.load_optimizer_state(self.backbone.net, self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema = [parallel.like(new, old).clone() for new, old in zip(state["ema"], self.ema, strict=True)]


def snapshot_plan(settings: TrainSettings) -> list[int]:
    """Images seen at each snapshot: the first step end at or past every multiple (or listed count), and the end."""
    end = math.ceil(settings.images / settings.batch_size) * settings.batch_size
    if isinstance(settings.snapshot_images, int):
        wanted = range(settings.snapshot_images, settings.images, settings.snapshot_images)
    else:
        wanted = settings.snapshot_images
    ends = {math.ceil(n / settings.batch_size) * settings.batch_size for n in wanted}
    return sorted({n for n in ends if n <= end} | {end})


def snapshot_path(out_dir: Path, images_seen: int) -> Path:
    return out_dir / f"snapshot-{images_seen:09d}.safetensors"


def find_snapshots(out_dir: str | Path) -> dict[int, Path]:
    """Images seen -> file, of all snapshots in a run's folder, in order."""
    found = sorted(Path(out_dir).glob("snapshot-*.safetensors"))
    return {int(path.stem.removeprefix("snapshot-")): path for path in found}


def self_train(
    backbone: Backbone,
    data: TrainingData,
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    seed: int = 0,
    device: torch.device,
    provenance: dict | None = None,
    state_minutes: float = 10.0,
    mode: str = "ddp",
    activation_checkpointing: bool = False,
    progress: bool = True,
) -> dict[int, Path]:
    """Fine-tune `backbone` in place and write its snapshots; continue what an earlier run left in `out_dir`.

    Returns images seen -> snapshot. Files: `settings.json`, `log.jsonl` (a line per step), `state.pt` (to continue
    from: at every snapshot and every `state_minutes`), `snapshot-<images>.safetensors`. Every rank calls it. Raises
    UserError where the folder holds a run with other settings, or the sizes do not divide. `mode` (ddp or fsdp) and
    `activation_checkpointing` trade memory for time. Afterwards the backbone holds the raw fine-tuned weights.
    """
    out_dir = Path(out_dir)
    shares = _shares(settings)
    identity = {
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "num_items": data.num_items,
        **(provenance or {}),
    }
    identity = json.loads(json.dumps(identity, default=str))
    if is_main():
        _claim(out_dir, identity)
    barrier()
    plan = snapshot_plan(settings)
    if broadcast_object(snapshot_path(out_dir, plan[-1]).exists()):
        return find_snapshots(out_dir)
    run = FineTune(backbone, settings, device, mode=mode, activation_checkpointing=activation_checkpointing)
    if broadcast_object((out_dir / "state.pt").exists()):
        run.load_state_dict(torch.load(out_dir / "state.pt", map_location="cpu", weights_only=True, mmap=True))
    if is_main():
        _cut_log(out_dir / "log.jsonl", run.images_seen)
    saved_at = time.monotonic()
    bar = tqdm(
        total=plan[-1], initial=run.images_seen, unit="img", desc="fine-tune", disable=not (progress and is_main())
    )
    first_step = run.images_seen // settings.batch_size
    batches = islice(backbone.data_order(data.num_items, settings.batch_size, seed), first_step, None)
    num_steps = plan[-1] // settings.batch_size
    with open(out_dir / "log.jsonl", "a") if is_main() else nullcontext() as log:
        for step, micro_batches in _prefetched(
            backbone, data, batches, range(first_step, num_steps), shares, seed, device
        ):
            lr = run.lr
            loss = float(all_reduce_(run.step(micro_batches))) / world_size()
            if not math.isfinite(loss) and settings.nonfinite_gradients == "raise" and settings.precision != "fp16":
                raise UserError(f"the loss is {loss} after {run.images_seen} images; lower the learning rate")
            if log:
                log.write(json.dumps({"images": run.images_seen, "loss": loss, "lr": lr}) + "\n")
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update(settings.batch_size)
            due = broadcast_object(time.monotonic() - saved_at > 60 * state_minutes) if step % 16 == 0 else False
            if run.images_seen in plan:
                _write_snapshot(run, out_dir, identity)
                due = True
            if due and run.images_seen < plan[-1]:
                if log:
                    log.flush()
                _write_state(run, out_dir)
                saved_at = time.monotonic()
    bar.close()
    if is_main():
        (out_dir / "state.pt").unlink(missing_ok=True)
    barrier()
    parallel.keep_activations(backbone.blocks())
    backbone.net.eval().requires_grad_(False)
    return find_snapshots(out_dir)


class _Loss(nn.Module):
    """The backbone's loss as a module, so that DistributedDataParallel sees its parameters."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.net = backbone.net
        self.loss = backbone.self_training_loss

    def forward(self, x: Tensor, labels: Tensor | None, generator: torch.Generator, precision: str) -> Tensor:
        dtype = PRECISIONS[precision]
        with torch.autocast(x.device.type, dtype) if dtype else nullcontext():
            return self.loss(x, labels, generator)


def _shares(settings: TrainSettings) -> int:
    """Micro batches per rank and step. Raises UserError where sizes do not divide."""
    count, rest = divmod(settings.batch_size, settings.micro_batch_size)
    if rest:
        raise UserError(
            f"--micro_batch_size {settings.micro_batch_size} does not divide the batch size {settings.batch_size}"
        )
    if count % world_size():
        raise UserError(
            f"{count} micro batches of {settings.micro_batch_size} cannot be dealt evenly to {world_size()} ranks; "
            "use a number of processes that divides it, or a smaller --micro_batch_size"
        )
    return count // world_size()


def _prefetched(
    backbone: Backbone,
    data: TrainingData,
    batches: Iterator[np.ndarray],
    steps: range,
    shares: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this rank's micro batches); files of the next step are read while this one trains."""

    def read(indices: np.ndarray) -> list[tuple[int, Tensor, Tensor | None]]:
        parts = np.split(indices, shares * world_size())
        return [(m, *data.batch(parts[m])) for m in range(rank(), len(parts), world_size())]

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming: Future | None = reader.submit(read, next(batches)) if len(steps) else None
        for step in steps:
            parts = upcoming.result()
            upcoming = reader.submit(read, next(batches)) if step + 1 < steps.stop else None
            micro_batches = []
            for number, prepared, labels in parts:
                generator = torch.Generator(device).manual_seed(derive_seed("micro batch", seed, step, number))
                with torch.no_grad():
                    x = backbone.encode(prepared.to(device, non_blocking=True), generator)
                micro_batches.append((x, None if labels is None else labels.to(device), generator))
            yield step, micro_batches


class _deterministic_dropout:
    """Dropout draws from the default generator, which takes no generator argument: seed it from the micro batch's
    stream, and put it back afterwards."""

    def __init__(self, generator: torch.Generator):
        self.seed = derive_seed("dropout", generator.initial_seed())
        self.devices = [generator.device] if generator.device.type == "cuda" else []

    def __enter__(self):
        self._fork = torch.random.fork_rng(self.devices)
        self._fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self._fork.__exit__(*error)


def _claim(out_dir: Path, identity: dict) -> None:
    found = out_dir / "settings.json"
    if found.exists():
        earlier = json.loads(found.read_text())
        if earlier != identity:
            a, b = ({**x, **x.get("settings", {})} for x in (earlier, identity))
            key = next(k for k in sorted({*a, *b}) if k != "settings" and a.get(k) != b.get(k))
            raise UserError(
                f"{out_dir}: holds a fine-tune with {key} = {a.get(key)!r}, not {b.get(key)!r}; name another --outdir"
            )
        return
    if find_snapshots(out_dir):
        raise UserError(f"{out_dir}: holds snapshots but no settings.json; name an empty or new --outdir")
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(found) as temporary:
        temporary.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")


def _cut_log(path: Path, images_seen: int) -> None:
    """Drop the lines of steps that will be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["images"] <= images_seen:
                kept.append(line)
        except ValueError:  # cut short by the kill
            break
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))


def _write_snapshot(run: FineTune, out_dir: Path, identity: dict) -> None:
    state = run.theta_syn()
    if is_main():
        metadata = {**identity, "images_seen": run.images_seen}
        path = snapshot_path(out_dir, run.images_seen)
        write_checkpoint(path, state, config=run.backbone.network_config(), metadata=metadata)
    barrier()


def _write_state(run: FineTune, out_dir: Path) -> None:
    state = run.state_dict()
    if is_main():
        with atomic_path(out_dir / "state.pt") as temporary:
            torch.save(state, temporary)
    barrier()
