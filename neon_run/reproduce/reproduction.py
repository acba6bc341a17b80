"""A row from its published files to its final FID: fetch, generate, finetune, search, merge, evaluate, report.

Each stage is one call of what the scripts call too. A stage that is on record with the same settings and inputs is not
done again; one that was stopped goes on, on any number of ranks. `neon_run.reproduce.ledger` has the files.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neon_core.backbone import Backbone
from neon_core.distributed import agree, barrier, broadcast_object, file_hash, is_main
from neon_core.finetune import open_set, train_on
from neon_core.precision import float32_precision
from neon_core.seeds import check_seeds, parse_seeds
from neon_core.selftrain import check_sizes, find_snapshots
from neon_core.synthetic import generate_set, withdraw_unless_whole
from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_files.published import obtain
from neon_metrics.detector import WEIGHTS_NAME, Detector
from neon_metrics.evaluate import Evaluator
from neon_run.merging.files import merge_files
from neon_run.merging.steps import steps_of
from neon_run.reproduce import measure, report
from neon_run.reproduce.ledger import Ledger
from neon_run.rows import Row
from neon_run.search.growing import GrowingSweep
from neon_run.search.quick import Budget
from neon_run.search.sweep import find_checkpoints


@dataclass(frozen=True)
class Plan:
    """What a user may choose; the row says the rest. `None`: the row's own."""

    base: str | Path | None = None
    reference: str | Path | None = None
    heldout: str | Path | None = None  # a second reference, told beside the first and searched on by nothing
    tokenizer: str | Path | None = None
    detector: Detector | str | Path | None = None  # None: the published Inception
    real_images: str | Path | None = None  # for KID, precision and recall
    batch_size: int = 64
    synthetic_from: int = 0  # the first seed of S
    seed: int = 0  # of the fine-tune and of the random control
    search: str = "quick"  # quick | official
    snapshots: int = 4  # of the fine-tune, evenly spaced, that the quick search looks at
    ranking_images: int | None = None  # None: the search's own numbers, as far as the evaluation has images
    deciding_images: int | None = None
    second_block: bool = True  # base and Neon once more, on other seeds
    controls: bool = True
    curve: Sequence[float] | None = None  # w to be measured for the plot; None: parts of the best one
    samples: tuple[int, int] = (4, 6)  # rows and columns of each grid of samples
    real_training: str | Path | None = None  # a training set: the control of as much more training on real data
    resamples: int = 30


@dataclass(frozen=True)
class Counts:
    """Images per setting: while the search ranks, for what it decides on (and the controls), and in the end."""

    ranking: int
    deciding: int
    whole: int

    @classmethod
    def of(cls, plan: Plan, whole: int) -> Counts:
        """UserError where they decrease."""
        deciding = min(Budget().deciding_images, whole) if plan.deciding_images is None else plan.deciding_images
        ranking = min(Budget().ranking_images, deciding) if plan.ranking_images is None else plan.ranking_images
        if not 2 <= ranking <= deciding <= whole:
            raise UserError(
                f"--ranking_images {ranking}, --deciding_images {deciding} and the {whole} seeds of the evaluation "
                "must not decrease in this order, and begin at 2 or more"
            )
        return cls(ranking, deciding, whole)


class Reproduction:
    """The stages of one row in one folder. Every rank makes the same calls. `on_stage` is told each stage's name."""

    def __init__(
        self,
        row: Row,
        out_dir: str | Path,
        plan: Plan,
        device: torch.device,
        command: str = "",
        on_stage: Callable[[str], None] = lambda stage: None,
    ):
        self.row, self.recipe, self.plan, self.device = row, row.recipe, plan, device
        self.out_dir = Path(out_dir).resolve()
        check_sizes(row.recipe.train)
        self.seeds = parse_seeds(row.recipe.evaluate_seeds)
        self.counts = Counts.of(plan, len(self.seeds))
        blocks = [(plan.synthetic_from, row.recipe.num_synthetic), (max(self.seeds) + 1, len(self.seeds))]
        for first, count in blocks if plan.second_block else blocks[:1]:
            check_seeds(range(first, first + count))
        self.ledger = Ledger(self.out_dir, on_stage)
        self.command = command

    def run(self) -> dict[str, Any]:
        """All stages; returns results.json. Raises UserError."""
        with self.ledger.running(self.row.id, self.command), float32_precision(self.row.tf32):
            files = self.fetch()
            self.files = {name: self.out_dir / entry["path"] for name, entry in files.items()}
            self.base_sha256 = files["base"]["sha256"]
            self.generate()
            trained = self.finetune()
            self.snapshots = agree(self.out_dir, lambda: find_checkpoints(self.out_dir / "finetune"), list)
            found = self.search(trained)
            self.merge(found)
            self.evaluate(found)
            return self.report()

    def fetch(self) -> dict[str, dict]:
        """Base, references, tokenizer and detector, on this machine (or made) and known by their hashes."""
        plan, prepare = self.plan, self.row.prepare
        wanted = {"base": plan.base, "reference": plan.reference, "heldout": plan.heldout, "tokenizer": plan.tokenizer}
        wanted["detector"] = plan.detector if isinstance(plan.detector, str | Path) else None
        if prepare is None:
            wanted["base"] = plan.base or self.recipe.base
            wanted["reference"] = plan.reference or self.recipe.fid_stats
            if plan.detector is None:
                wanted["detector"] = WEIGHTS_NAME
            if not plan.tokenizer:
                wanted |= {name: name for name in self.row.files}
        paths = {name: obtain(path).resolve() for name, path in wanted.items() if path}
        known = {name: (str(p), p.stat().st_size, p.stat().st_mtime_ns) for name, p in paths.items()}
        if prepare is not None:
            known |= {"prepare": dataclasses.asdict(prepare), "seed": plan.seed}

        def work() -> dict:
            made = {} if prepare is None else prepare(self.row, self.out_dir / "prepared", plan.seed)
            there = {name: Path(path) for name, path in (made | paths).items()}
            hashes = broadcast_object({n: sha256_file(p) for n, p in there.items()} if is_main() else None)
            inside = {n: p.relative_to(self.out_dir) if n in made and n not in paths else p for n, p in there.items()}
            return {
                "outputs": {n: {"path": str(inside[n]), "sha256": hashes[n]} for n in there},
                "files": [str(p) for n, p in inside.items() if not p.is_absolute()],
                **({} if prepare is None else {"training_images": prepare.training_images}),
            }

        return self.ledger.run("fetch", broadcast_object(known), [], work)

    def load(self) -> Backbone:
        """theta_base."""
        options = {}
        if self.row.tokenizer and self.plan.tokenizer:
            options[self.row.tokenizer] = self.plan.tokenizer
        return self.row.backbone.load(self.files["base"], self.recipe, self.device, **options)

    @property
    def provenance(self) -> dict[str, Any]:
        return {"recipe": self.recipe.name, "base": self.files["base"].name, "base_sha256": self.base_sha256}

    def generate(self) -> dict:
        count, settings = self.recipe.num_synthetic, self.recipe.generate

        def work() -> dict:
            _ = self.evaluator  # a reference or detector that cannot be used is refused now, not in two days
            generate_set(
                self.load(),
                range(self.plan.synthetic_from, self.plan.synthetic_from + count),
                self.out_dir / "synthetic",
                settings=settings,
                batch_size=self.plan.batch_size,
                provenance=self.provenance,
            )
            return {"files": ["synthetic/dataset.json"], **self.cost(count, settings)}

        what = {"count": count, "settings": settings, "batch_size": self.plan.batch_size}
        what |= {"from": self.plan.synthetic_from} if self.plan.synthetic_from else {}
        if is_main():
            withdraw_unless_whole(self.out_dir / "synthetic")
        return self.ledger.run("generate", what, ["fetch"], work)

    def finetune(self) -> dict:
        def work() -> dict:
            _ = self.evaluator
            backbone = self.load()
            images = open_set(self.out_dir / "synthetic", use_labels=backbone.num_classes > 0)
            made = train_on(
                images,
                backbone,
                self.recipe.train,
                self.out_dir / "finetune",
                device=self.device,
                provenance=self.provenance,
                seed=self.plan.seed,
            )
            files = [str(path.relative_to(self.out_dir)) for path in made.values()]
            hashes = broadcast_object({n: sha256_file(self.out_dir / n) for n in files} if is_main() else None)
            return {"outputs": {"snapshots": hashes}, "files": files, "training_images": max(made)}

        what = {"train": dataclasses.asdict(self.recipe.train), "recipe": self.recipe, "seed": self.plan.seed}
        return self.ledger.run("finetune", what, ["generate"], work)

    def search(self, trained: dict) -> dict:
        what = {
            "kind": self.plan.search,
            "snapshots": self.plan.snapshots,
            "images": [self.counts.ranking, self.counts.deciding],
            "trained": trained["snapshots"],
            "row": [self.row.w_range, self.row.guidance, self.row.guidance_range, self.recipe.w],
            **self.measured_with,
        }
        if self.plan.search == "official":
            what["grid"] = self.row.grid

        def work() -> dict:
            found = measure.find(self.row, self.plan, self.counts, self.sweep, self.seeds)
            return {"outputs": found, **self.cost(found["images"], self.recipe.evaluate)}

        return self.ledger.run("search", what, ["finetune"], work)

    def merge(self, found: dict) -> dict:
        best, out = found["best"], self.out_dir / "neon.safetensors"

        def work() -> dict:
            steps = steps_of(self.sweep.backbone.net, best["w"])  # on every rank: they load the network together
            if is_main():
                merge_files(self.files["base"], self.snapshots[best["snapshot"]], steps, out)
            barrier()
            outputs = {"path": out.name, "sha256": file_hash(out)}
            return {"outputs": outputs, "files": [out.name]}

        return self.ledger.run("merge", {"snapshot": best["snapshot"], "w": best["w"]}, ["search"], work)

    def evaluate(self, found: dict) -> dict:
        real = self.plan.real_training or (self.plan.controls and self.files.get("real_training")) or None
        what = {
            "second_block": self.plan.second_block,
            "controls": self.plan.controls,
            "curve": self.plan.curve,
            "samples": self.plan.samples,
            "real_training": self.plan.real_training,
            "resamples": self.plan.resamples,
            "seed": self.plan.seed,
            **self.measured_with,
        }

        def work() -> dict:
            trained = {}
            if real:
                path = self.train_on_real(found["best"]["snapshot"], real)
                self.sweep.snapshots[measure.REAL] = path
                trained["training_images"] = max(find_snapshots(path.parent))
            measured = measure.final(self.row, self.plan, self.counts, self.sweep, self.seeds, found, self.out_dir)
            return {"outputs": measured, **self.cost(measured["images"], self.recipe.evaluate), **trained}

        return self.ledger.run("evaluate", what, ["search", "merge"], work)

    def train_on_real(self, snapshot: str, real: str | Path) -> Path:
        """The base trained on real images as long, and in the same way, as `snapshot` was on synthetic ones."""
        self.__dict__.pop("sweep", None)  # one network in memory at a time
        length = {path.stem: seen for seen, path in find_snapshots(self.out_dir / "finetune").items()}[snapshot]
        backbone = self.load()
        images = open_set(real, use_labels=backbone.num_classes > 0)
        made = train_on(
            images,
            backbone,
            dataclasses.replace(self.recipe.train, images=length),
            self.out_dir / "controls" / f"real-data-{length}",
            device=self.device,
            provenance=self.provenance,
            cache_dir=self.out_dir / "controls" / "prepared",
            seed=self.plan.seed,
        )
        return made[max(made)]

    def report(self) -> dict:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
        }
        results = report.collect(self.row, self.ledger, versions)

        def work() -> dict:
            if is_main():
                report.write(results, self.out_dir)
            barrier()
            return {"files": ["results.json", "report.html"]}

        self.ledger.run("report", {"layout": report.LAYOUT}, ["evaluate"], work)
        return results

    @cached_property
    def evaluator(self) -> Evaluator:
        detector = self.files.get("detector", self.plan.detector)
        if self.row.detector and isinstance(detector, Path):
            detector = self.row.detector(detector, self.device)
        metrics = ["fid", *(["kid", "prdc"] if self.plan.real_images else [])]
        made = Evaluator(
            self.files["reference"],
            metrics=metrics,
            device=self.device,
            detector=detector,
            real_images=self.plan.real_images,
            heldout=self.files.get("heldout"),
        )
        if getattr(made.detector, "num_classes", 0):
            made.metrics = (*made.metrics, "is")
        made.new_accumulator(len(self.seeds))  # raises where the images are too few for one of the metrics
        return made

    @cached_property
    def sweep(self) -> GrowingSweep:
        """Loaded once, for the search and the evaluation."""
        return GrowingSweep(
            self.load(),
            self.evaluator,
            self.snapshots,
            self.out_dir / "search",
            settings=self.row.sampler(self.recipe.evaluate),
            batch_size=self.plan.batch_size,
            identity={"base_sha256": self.base_sha256, "tf32": self.row.tf32},
        )

    @property
    def measured_with(self) -> dict[str, Any]:
        """What every FID of this run depends on beside the network."""
        detector = self.plan.detector
        return {
            "settings": self.row.sampler(self.recipe.evaluate),
            "seeds": self.recipe.evaluate_seeds,
            "batch_size": self.plan.batch_size,
            "real_images": self.plan.real_images,
            "detector": getattr(detector, "name", "file"),
            "tf32": self.row.tf32,
        }

    def cost(self, images: int, settings: dict) -> dict[str, int]:
        count: Callable | None = self.row.evaluations
        return {"images": images, **({"network_evaluations": images * count(settings)} if count else {})}
