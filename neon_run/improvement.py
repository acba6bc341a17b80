"""`improve`: Neon for any generator, as a module with its sampler and its loss.

It is a row like the others, and runs through the same stages: S, fine-tune, search, merge, evaluation, report. New is
only the length of the fine-tune, which is measured by the distance that the weights travel.

    <out>/base.safetensors    theta_base, as it was given
    <out>/improve.json        whose run this is
    <out>/probe/              short fine-tunes that find the length
    <out>/base-*.safetensors  of a LoRA: theta_base with the trained down factors, the same network
    <out>/neon.safetensors    theta_neon; results.json, report.html and the rest as of `neon reproduce`
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neon_core.backbone import TrainSettings
from neon_core.distributed import agree, barrier, file_hash, is_main, print0, session
from neon_core.schedules import Ema, LinearRamp
from neon_files.atomic import write_json
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.errors import UserError, say
from neon_files.image_set import ImageSet
from neon_files.run_files import read_record
from neon_metrics.detector import Detector
from neon_metrics.detectors import open_detector
from neon_metrics.image_statistics import reference_of
from neon_metrics.own_score import ScoreEvaluator
from neon_metrics.reference import write_reference
from neon_run import stages
from neon_run.cli import check_writable
from neon_run.low_rank import Factors, factors_of, learning_rate, squares, with_downs_of
from neon_run.own_generator import Parts, backbone_of, examined, fingerprint, fingerprint_of
from neon_run.reproduce.reproduction import Plan, Reproduction
from neon_run.row import Row

DISTANCE = 0.007  # |theta_syn - theta_base| / |theta_base|: puts the best w near 1 in the models measured so far
LR = 0.002  # times the root mean square weight: the learning rate, about what an Adam step moves a weight by
RAMP_STEPS = 8  # until Adam's averages are worth something
PROBE_STEPS = 16  # of the first probe
MOST_EPOCHS = 50  # of the fine-tune, if the weights hardly move
FIRST_SEED = 1_000_000  # of the evaluation; those of S begin at 0


@dataclass(frozen=True)
class Result:
    """`base` and `neon`: distance or score on seeds that no choice has seen; lower is better."""

    w: float  # 0: the base is kept
    base: float
    neon: float  # at the best w of the search
    standard_error: float  # of base - neon
    improved: bool  # base - neon is more than 1.96 standard errors
    checkpoint: Path  # theta_neon where that is better, else theta_base
    report: Path
    details: Mapping[str, Any]  # results.json

    def __str__(self) -> str:
        change = f"{self.base:.4g} -> {self.neon:.4g}, difference {self.base - self.neon:.3g}"
        error = f"{change} ± {1.96 * self.standard_error:.2g}"
        if self.improved:
            return f"Neon is better: {error}, w = {self.w:.3g} | {self.checkpoint}"
        return f"the base is kept, since Neon is not shown to be better: {error} | {self.checkpoint}"


def improve(
    net: nn.Module,
    *,
    sample: Callable[[nn.Module, list[int], Tensor | None], Tensor],
    loss: Callable[[nn.Module, Tensor, Tensor | None, torch.Generator], Tensor],
    real: str | Path | None = None,
    score: Callable[[Tensor], float] | None = None,
    out: str | Path,
    num_classes: int = 0,
    detector: Detector | str | Path | None = None,
    num_synthetic: int = 2_000,
    distance: float = DISTANCE,
    lr: float | None = None,
    batch_size: int = 128,
    micro_batch_size: int = 32,
    ema: float | None = None,
    precision: str = "fp32",
    sample_batch_size: int = 64,
    ranking_images: int = 2_000,
    images: int = 5_000,
    controls: bool = True,
    seed: int = 0,
    device: str | None = None,
    update_net: bool = False,
) -> Result:
    """Improve the trained `net` by Neon; call it again, with the same arguments, to go on after a kill.

    `sample(net, seeds, labels)`: one image for each of `seeds`, a function of that seed and label alone: uint8
    [B, C, H, W], or with `score` any floats [B, ...]. `loss(net, images, labels, generator)`: the usual training loss
    of images as `sample` gives them (floats as float32), a scalar; randomness from `generator`. `labels`: int64 [B] on
    the device, seed mod `num_classes`, or None without classes.
    Compared is either with `real`, a folder or .zip of images or reference statistics (.npz), by the Frechet distance
    in the features of `detector` ("inception", "dinov2", "timm:NAME", or any Detector); or by `score(images)`, given
    [n, ...] on the CPU.

    `num_synthetic`: |S|. `distance`: how far the fine-tune goes, relative to the norm of the trained weights. `lr`: by
    default 0.002 times their root mean square. `ema`: decay per step of an average of the weights. `images`: of the
    decision, on the search's seeds and again on fresh ones; `ranking_images`: of each w on the way. `controls`:
    self-training, a random direction and the curve over w for the report. `device`: by default the net's.
    `update_net`: load the better weights into `net`. Several processes (torchrun) share the work.

    Raises UserError, in one sentence, for what cannot be used.
    """
    if (real is None) == (score is None):
        raise UserError("improve: give either real= (images or reference statistics) or score= (a function of images)")
    factors, out = factors_of(net), Path(out)
    here = next(net.parameters(), torch.empty(0)).device
    chosen = device or (here.type if here.type in ("cpu", "cuda") else "auto")
    with nullcontext(torch.device(chosen)) if dist.is_initialized() else session(chosen) as where:
        parts = examined(Parts(net, sample, loss, num_classes), where)
        if real is not None and not parts.pictures:
            raise UserError(
                f"sample: gives {parts.dtype} {list(parts.shape)} per image; to compare with real= it must give square "
                "uint8 images [B, 3 or 1, H, H]; for other kinds give score="
            )
        check_writable(out, "out")
        _claim(out, parts, score)
        plan = Plan(
            base=out / "base.safetensors",
            detector=detector,
            seed=seed,
            snapshots=1,
            ranking_images=min(ranking_images, images),
            deciding_images=images,
            controls=controls,
            samples=(4, 6) if parts.pictures else (0, 0),
            **_compared_with(parts, out, real, score, detector, where),
        )
        if lr is None:
            lr = learning_rate(net, factors, LR) if factors else LR * _root_mean_square(net)
        train = TrainSettings(
            images=PROBE_STEPS * batch_size,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            lr=float(f"{lr:.3g}"),
            schedule=LinearRamp(RAMP_STEPS * batch_size),
            betas=(0.9, 0.95),  # the square's average must be right within tens of steps
            clip_norm=None,
            ema=Ema(decay=ema) if ema else None,
            precision=precision,
            snapshot_images=1 << 40,  # the last alone
        )
        row = Row(
            id=type(net).__name__,
            backbone=backbone_of(parts),
            num_synthetic=num_synthetic,
            generate={},
            train=train,
            w=1.0,
            evaluate={},
            evaluate_seeds=f"{FIRST_SEED}-{FIRST_SEED + images - 1}",
            batch_size=sample_batch_size,
            distance="score" if score else "FID" if plan.detector is None else "Frechet distance",
        )
        run = Improvement(row, out, plan, where, " ".join(["python", *sys.argv]), distance=distance, factors=factors)
        result = _result(run.run(), out)
        print0(f"{row.id} | {result} | {result.report}")
        if update_net:
            load_strict(net, read_checkpoint(result.checkpoint))
    return result


class Improvement(Reproduction):
    """A run whose fine-tune is as long as it takes for the weights to travel `distance`, relative to their norm."""

    def __init__(self, *args: Any, distance: float, factors: list[Factors], **options: Any):
        super().__init__(*args, **options)
        self.distance, self.factors = distance, factors

    def finetune(self) -> dict:
        if self.plan.evaluator is not None:
            self._check_score()
        images = self.length()
        self.row = replace(self.row, train=replace(self.row.train, images=images))
        self.free_network()
        trained = super().finetune()
        if self.factors:
            (snapshot,) = self.find_snapshots().values()
            self.files["base"] = self.with_trained_downs(snapshot)
            self.free_network()
        return trained

    def length(self) -> int:
        """Images of the fine-tune: probes of growing length, until the distance can be foretold from the last one.

        A fine-tune of n steps goes as far as n^p; p follows from the distance at n and n / 2. Each probe is a fine-tune
        in a folder of its own, which a killed run goes on with.
        """
        batch, steps = self.row.train.batch_size, PROBE_STEPS
        most = max(PROBE_STEPS, MOST_EPOCHS * self.row.num_synthetic // batch)
        while True:
            half, whole = (self.travelled(path) for path in self.probe(steps))
            if not whole:
                raise UserError("loss: training on it does not move the weights; check what its gradient reaches")
            power = min(max(math.log2(whole / half) if half else 1.0, 0.3), 1.0)
            wanted = max(round(steps * (self.distance / whole) ** (1 / power)), 2)
            print0(f"probe: {steps} steps move the weights by {100 * whole:.3g} % of their norm")
            if wanted <= 1.25 * steps or steps == most:
                break
            steps = min(wanted, 8 * steps, most)
        if wanted > most:
            say(f"note: {most} steps are too few to move the weights by {100 * self.distance:.2g} %; raise lr=")
        if wanted < RAMP_STEPS:
            say(f"note: {wanted} steps move the weights by {100 * self.distance:.2g} %, too few to average; lower lr=")
        return min(wanted, most) * batch

    def probe(self, steps: int) -> list[Path]:
        """Snapshots after half of `steps` and after all."""
        batch = self.row.train.batch_size
        train = replace(self.row.train, images=steps * batch, snapshot_images=(steps // 2 * batch,))
        self.free_network()
        model = replace(self.model, row=replace(self.row, train=train))
        run = stages.TrainingRun(seed=self.plan.seed)
        snapshots = stages.finetune(model, self.out_dir / "synthetic", self.out_dir / "probe" / f"{steps}-steps", run)
        return [snapshots[n * batch] for n in (steps // 2, steps)]

    def travelled(self, snapshot: Path) -> float:
        """|theta_syn - theta_base| / |theta_base| over the trained parameters."""
        base, syn = (read_checkpoint(path).state for path in (self.files["base"], snapshot))
        names = self.model.backbone.trained  # type: ignore[attr-defined]  # of an improvement's own backbone
        moved, held = squares(base, syn, names, self.factors)
        return math.sqrt(moved / held)

    def with_trained_downs(self, snapshot: Path) -> Path:
        """theta_base once more, from which `snapshot` differs by its up factors alone: see `low_rank`."""
        path = self.out_dir / f"base-{file_hash(snapshot)[:12]}.safetensors"
        if is_main() and not path.exists():
            base = read_checkpoint(self.files["base"])
            state = with_downs_of(read_checkpoint(snapshot).state, base.state, self.factors)
            write_checkpoint(path, state, config=base.config)
        barrier()
        return path

    def _check_score(self) -> None:
        """UserError, before any training, where the score of S is not a number."""
        images = ImageSet(self.out_dir / "synthetic", use_labels=False)
        rows = images.images(range(len(images))).flatten(1).float()
        assert isinstance(self.plan.evaluator, ScoreEvaluator)
        value = self.plan.evaluator.of(rows)
        if not math.isfinite(value):
            raise UserError(f"score: is {value} for the {len(rows)} images of S; a finite number is wanted")


def _compared_with(
    parts: Parts,
    out: Path,
    real: str | Path | None,
    score: Callable[[Tensor], float] | None,
    detector: Detector | str | Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """What images are measured against: {"evaluator"} or {"reference"} of the plan."""
    if score is not None:
        digest = fingerprint(score)
        return {"evaluator": ScoreEvaluator(score, parts.shape, parts.dtype, device=device, digest=digest)}
    assert real is not None  # one of the two is given
    if str(real).endswith(".npz"):
        return {"reference": Path(real)}
    return {"reference": _reference(Path(real), parts, detector, device, out)}


def _reference(real: Path, parts: Parts, detector: Any, device: torch.device, out: Path) -> Path:
    """Statistics of the real images, made once and kept in `out`."""
    real_set = agree(real, lambda: ImageSet(real, use_labels=False), lambda images: images.digest)
    if real_set.shape != parts.shape:
        raise UserError(
            f"{real}: its images are {' x '.join(map(str, real_set.shape))}, those of sample "
            f"{' x '.join(map(str, parts.shape))}; bring them to one size and one number of channels"
        )
    detector = open_detector(detector, device)
    about = fingerprint_of(f"{real_set.digest} {detector.name}")
    path = out / f"reference-{about}.npz"
    if not agree(path, path.exists):
        reference = reference_of(real_set, detector, device)
        if is_main():
            write_reference(path, reference)
        barrier()
    return path


def _claim(out: Path, parts: Parts, score: Callable | None) -> None:
    """Write theta_base and what the run is of; UserError where `out` holds a run of something else."""
    about: dict[str, Any] = {
        name: fingerprint(f) for name, f in (("sample", parts.sample), ("loss", parts.loss), ("score", score))
    }
    about |= {"num_classes": parts.num_classes, "shape": list(parts.shape)}
    state = {name: value.detach().cpu().contiguous() for name, value in parts.net.state_dict().items()}
    if is_main():
        if (out / "improve.json").exists():
            found = read_record(out / "improve.json")
            base = read_checkpoint(out / "base.safetensors").state
            same = base.keys() == state.keys() and all(torch.equal(base[name], state[name]) for name in state)
            differs = next((name for name in about if found.get(name) != about[name]), None if same else "net")
            if differs:
                raise UserError(f"{out}: holds a run with another {differs}; name another out=, or remove that run")
        else:
            write_checkpoint(out / "base.safetensors", state, config={"class": type(parts.net).__name__, "kwargs": {}})
            write_json(out / "improve.json", about)
    barrier()


def _root_mean_square(net: nn.Module) -> float:
    """Of the trainable weights."""
    trained = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
    total = sum(value.double().square().sum().item() for value in trained)
    return math.sqrt(total / sum(value.numel() for value in trained)) or 1.0


def _result(results: Mapping[str, Any], out: Path) -> Result:
    fresh, error = results["second_block"], results["intervals"]["gain"]["standard_error"]
    base, neon = (fresh[name]["fid"] for name in ("base", "neon"))
    improved = bool(results["best"]["w"]) and base - neon > 1.96 * error
    return Result(
        w=results["best"]["w"] if improved else 0.0,
        base=base,
        neon=neon,
        standard_error=error,
        improved=improved,
        checkpoint=out / ("neon.safetensors" if improved else "base.safetensors"),
        report=out / "report.html",
        details=results,
    )
