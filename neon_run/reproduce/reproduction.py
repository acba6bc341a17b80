"""A row from its published files to its final FID: fetch, generate, finetune, search, merge, evaluate, report.

Each stage is one call of `neon_run.stages`, as in the scripts. A stage that is on record with the same settings and
inputs is not done again; one that was stopped goes on, on any number of ranks. Files: `neon_run.reproduce.ledger`.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neon_core.distributed import agree, barrier, broadcast_object, file_hash, is_main
from neon_core.precision import float32_precision
from neon_core.seeds import check_seeds, parse_seeds
from neon_core.selftrain import check_sizes, find_snapshots
from neon_core.synthetic import withdraw_unless_whole
from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_files.published import obtain
from neon_metrics.detector import WEIGHTS_NAME, Detector
from neon_metrics.detectors import is_detector_name
from neon_metrics.evaluate import Evaluator
from neon_run import stages
from neon_run.merging.files import merge_files
from neon_run.merging.steps import steps_of
from neon_run.reproduce import measure, report
from neon_run.reproduce.ledger import Ledger
from neon_run.reproduce.measure import fresh_blocks
from neon_run.row import Prepare, Protocol, Row
from neon_run.search.find import SearchPlan
from neon_run.search.growing import GrowingSweep
from neon_run.search.sweep import find_checkpoints


@dataclass(frozen=True)
class Plan:
    """What a user may choose beside the row's own settings. `None`: the row's."""

    base: str | Path | None = None
    reference: str | Path | None = None
    heldout: str | Path | None = None  # a second reference, reported beside the first and searched on by nothing
    tokenizer: str | Path | None = None
    detector: Detector | str | Path | None = None  # None: the published Inception
    real_images: str | Path | None = None  # for KID, precision and recall
    seed: int = 0  # of the fine-tune and of the random control
    search: str = "quick"  # quick | official
    snapshots: int = 4  # of the fine-tune, evenly spaced, that the quick search visits
    ranking_images: int | None = None  # None: the search's own numbers, as far as the evaluation has images
    deciding_images: int | None = None
    second_block: bool = True  # base and Neon once more, on other seeds; False: no fresh blocks at all
    controls: bool = True
    curve: Sequence[float] | None = None  # w to be measured for the plot; None: parts of the best one
    samples: tuple[int, int] = (4, 6)  # rows and columns of each grid of samples
    data: str | None = None  # of real images, where the row prepares its files from them
    real_training: str | Path | None = None  # a training set: the control of as much more training on real data
    resamples: int = 30
    evaluator: Evaluator | None = None  # in place of one made from reference, detector and real images

    def search_plan(self, whole: int, protocol: Protocol) -> SearchPlan:
        """With the numbers of images per setting, at most `whole`. UserError where they decrease."""
        deciding = min(protocol.deciding_images, whole) if self.deciding_images is None else self.deciding_images
        ranking = min(protocol.ranking_images, deciding) if self.ranking_images is None else self.ranking_images
        if not 2 <= ranking <= deciding <= whole:
            raise UserError(
                f"--ranking_images {ranking}, --deciding_images {deciding} and the {whole} seeds of the evaluation "
                "must not decrease in this order, and begin at 2 or more"
            )
        return SearchPlan(self.search, self.snapshots, ranking, deciding)


class Reproduction:
    """The stages of one row in one folder. Every rank makes the same calls. `on_stage` hears each stage's name."""

    def __init__(
        self,
        row: Row,
        out_dir: str | Path,
        plan: Plan,
        device: torch.device,
        command: str = "",
        on_stage: Callable[[str], None] = lambda stage: None,
    ):
        self.row, self.plan, self.device = row, plan, device
        self.out_dir = Path(out_dir).resolve()
        check_sizes(row.train)
        self.seeds = parse_seeds(row.evaluate_seeds)
        self.search_plan = plan.search_plan(len(self.seeds), row.protocol)
        for block in (range(row.synthetic_seed, row.synthetic_seed + row.num_synthetic), *fresh_blocks(row, plan)):
            check_seeds(block)
        self.prepare = with_data(row, plan.data)
        if plan.tokenizer and not row.backbone.frozen_files(Path(plan.base or row.base), **row.load):
            raise UserError(f"--tokenizer: {row.id} has none; leave it out")
        self.ledger = Ledger(self.out_dir, on_stage)
        self.command = command

    def run(self) -> dict[str, Any]:
        """All stages; returns results.json. Raises UserError."""
        with self.ledger.running(self.row.id, self.command):
            files = self.fetch()
            self.files = {name: self.out_dir / entry["path"] for name, entry in files.items()}
            self.generate()
            trained = self.finetune()
            self.snapshots = agree(self.out_dir, self.find_snapshots, list)
            searched = self.search(trained)
            self.merge(searched)
            self.evaluate(searched)
            return self.report()

    def find_snapshots(self) -> dict[str, Path]:
        """Those of the fine-tune that the search may visit."""
        grid = self.row.grid
        return find_checkpoints(self.out_dir / "finetune", grid.first_images, grid.last_images)

    # Files

    def fetch(self) -> dict[str, dict]:
        """Base, references, frozen parts and detector, on this machine (or prepared here), each with its hash."""
        plan, prepare = self.plan, self.prepare
        sources = {"base": plan.base, "reference": plan.reference, "heldout": plan.heldout}
        if isinstance(plan.detector, str | Path) and not is_detector_name(plan.detector):
            sources["detector"] = plan.detector
        if prepare is None:
            sources["base"] = plan.base or self.row.base
            sources["reference"] = plan.reference or self.row.fid_stats
            if plan.detector is None and plan.evaluator is None:
                sources["detector"] = WEIGHTS_NAME
        paths = {name: obtain(path).resolve() for name, path in sources.items() if path}
        if prepare is None:
            paths |= {name: obtain(path).resolve() for name, path in self.frozen_files(paths["base"]).items()}
        identity: dict[str, Any] = {name: (str(p), p.stat().st_size, p.stat().st_mtime_ns) for name, p in paths.items()}
        if prepare is not None:
            settings: Any = prepare  # a dataclass, see `Prepare`
            identity |= {"prepare": dataclasses.asdict(settings), "seed": plan.seed}

        def work() -> dict:
            prepared = {} if prepare is None else prepare(self.row, self.out_dir / "prepared", plan.seed)
            files_here = {name: Path(path) for name, path in {**prepared, **paths}.items()}
            hashes = broadcast_object(
                {n: sha256_file(_hashed_file(p)) for n, p in files_here.items()} if is_main() else None
            )
            own = {n for n in prepared if n not in paths}
            inside = {n: p.relative_to(self.out_dir) if n in own else p for n, p in files_here.items()}
            return {
                "outputs": {n: {"path": str(inside[n]), "sha256": hashes[n]} for n in files_here},
                "files": [str(_hashed_file(files_here[n]).relative_to(self.out_dir)) for n in files_here if n in own],
                **({} if prepare is None else {"training_images": prepare.training_images}),
            }

        files = self.ledger.run("fetch", broadcast_object(identity), [], work)
        for name, entry in files.items() if is_main() else ():
            path = self.out_dir / entry["path"]
            if sha256_file(_hashed_file(path)) != entry["sha256"]:
                raise UserError(
                    f"{path}: is not the {name} that this run began with; put it back, or name another --out"
                )
        return files

    def frozen_files(self, base: Path) -> dict[str, Path]:
        """Option of `load` -> file of a frozen part, --tokenizer's where it is given."""
        names = self.row.backbone.frozen_files(base, **self.row.load)
        if not self.plan.tokenizer:
            return names
        return self.row.backbone.frozen_files(base, **{**self.row.load, next(iter(names)): Path(self.plan.tokenizer)})

    @cached_property
    def model(self) -> stages.Model:
        """theta_base; `model.backbone` is loaded once, for the search and the evaluation."""
        frozen = self.row.backbone.frozen_files(self.files["base"], **self.row.load)
        frozen = {name: self.files.get(name, path) for name, path in frozen.items()}
        return stages.Model(self.row, self.files["base"], self.device, frozen=frozen)

    def free_network(self) -> None:
        """Forget the loaded network: one in memory at a time."""
        for name in ("model", "sweep"):
            self.__dict__.pop(name, None)

    # Stages

    def generate(self) -> dict:
        row = self.row

        def work() -> dict:
            _ = self.evaluator  # a reference or detector that cannot be used is refused now, not in two days
            stages.generate(self.model, self.out_dir / "synthetic")
            return {"files": ["synthetic/dataset.json"], **self.cost(row.num_synthetic, row.generate)}

        settings = {"count": row.num_synthetic, "settings": row.generate, "batch_size": row.batch_size}
        settings |= {"from": row.synthetic_seed} if row.synthetic_seed else {}
        if is_main():
            withdraw_unless_whole(self.out_dir / "synthetic")
        return self.ledger.run("generate", settings, ["fetch"], work)

    def finetune(self) -> dict:
        def work() -> dict:
            _ = self.evaluator
            self.free_network()
            run = stages.TrainingRun(seed=self.plan.seed)
            snapshots = stages.finetune(self.model, self.out_dir / "synthetic", self.out_dir / "finetune", run)
            files = [str(path.relative_to(self.out_dir)) for path in snapshots.values()]
            hashes = broadcast_object({n: sha256_file(self.out_dir / n) for n in files} if is_main() else None)
            return {"outputs": {"snapshots": hashes}, "files": files, "training_images": max(snapshots)}

        settings = {
            "train": dataclasses.asdict(self.row.train),
            "row": [self.row.id, self.row.load, self.row.load_training],
            "seed": self.plan.seed,
        }
        return self.ledger.run("finetune", settings, ["generate"], work)

    def search(self, trained: Mapping[str, Any]) -> dict:
        plan, row = self.search_plan, self.row
        settings = {
            "kind": plan.kind,
            "snapshots": plan.snapshots,
            "images": [plan.ranking_images, plan.deciding_images],
            "trained": trained["snapshots"],
            "row": [row.w_range, row.axes, row.w],
            **self.measured_with,
        }
        if plan.kind == "official":
            settings["grid"] = row.grid

        def work() -> dict:
            result = stages.search(self.model, self.sweep, plan, self.seeds)
            return {"outputs": result, **self.cost(result["images"], row.evaluate)}

        return self.ledger.run("search", settings, ["finetune"], work)

    def merge(self, searched: Mapping[str, Any]) -> dict:
        best, out = searched["best"], self.out_dir / "neon.safetensors"

        def work() -> dict:
            steps = steps_of(self.sweep.backbone.net, best["w"])  # on every rank: they load the network together
            if is_main():
                ends = self.files["base"], self.snapshots[best["snapshot"]]
                merge_files(*ends, steps, out, dense=True)  # whatever the names: this network was loaded
            barrier()
            return {"outputs": {"path": out.name, "sha256": file_hash(out)}, "files": [out.name]}

        return self.ledger.run("merge", {"snapshot": best["snapshot"], "w": best["w"]}, ["search"], work)

    def evaluate(self, searched: Mapping[str, Any]) -> dict:
        plan, row = self.plan, self.row
        real = plan.real_training or (plan.controls and self.files.get("real_training")) or None
        settings = {
            "second_block": plan.second_block,
            "controls": plan.controls,
            "curve": plan.curve,
            "samples": plan.samples,
            "real_training": plan.real_training,
            "protocol": [row.protocol.control_images, row.protocol.controls_twice, row.protocol.fresh_blocks],
            "resamples": plan.resamples,
            "seed": plan.seed,
            **self.measured_with,
        }

        def work() -> dict:
            trained = {}
            if real:
                path = self.train_on_real(searched["best"]["snapshot"], Path(real))
                self.sweep.snapshots[measure.REAL] = path
                trained["training_images"] = max(find_snapshots(path.parent))
            if "longer" in self.files:
                self.sweep.snapshots[measure.LONGER] = self.files["longer"]
            report_data = measure.Measurement(row, plan, self.search_plan, self.sweep, self.seeds, self.out_dir)
            with float32_precision(row.tf32):
                measured = report_data.final(searched)
            return {"outputs": measured, **self.cost(measured["images"], row.evaluate), **trained}

        return self.ledger.run("evaluate", settings, ["search", "merge"], work)

    def train_on_real(self, snapshot: str, real: Path) -> Path:
        """The base trained on real images as long, and in the same way, as `snapshot` was on synthetic ones."""
        self.free_network()
        length = {path.stem: seen for seen, path in find_snapshots(self.out_dir / "finetune").items()}[snapshot]
        row = dataclasses.replace(self.row, train=dataclasses.replace(self.row.train, images=length))
        controls = self.out_dir / "controls"
        run = stages.TrainingRun(seed=self.plan.seed, cache_dir=controls / "prepared")
        model = dataclasses.replace(self.model, row=row)
        snapshots = stages.finetune(model, real, controls / f"real-data-{length}", run)
        return snapshots[max(snapshots)]

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

        self.ledger.run("report", {"layout": report.LAYOUT, "claim": results["acceptance"]}, ["evaluate"], work)
        return results

    # Measuring

    @cached_property
    def evaluator(self) -> Evaluator:
        if self.plan.evaluator is not None:
            return self.plan.evaluator
        detector = self.files.get("detector", self.plan.detector)
        if self.row.detector and isinstance(detector, Path):
            detector = self.row.detector(detector, self.device)
        evaluator = stages.open_evaluator(
            self.files["reference"],
            self.device,
            detector=detector,
            real_images=self.plan.real_images,
            heldout=self.files.get("heldout"),
        )
        evaluator.new_accumulator(len(self.seeds))  # raises where the images are too few for one of the metrics
        return evaluator

    @cached_property
    def sweep(self) -> GrowingSweep:
        """The points of the search and of the report."""
        return stages.open_sweep(self.model, self.evaluator, self.snapshots, self.out_dir / "search")

    @property
    def measured_with(self) -> dict[str, Any]:
        """What every FID of this run depends on beside the network."""
        detector = self.plan.evaluator.detector if self.plan.evaluator else self.plan.detector
        return {
            "settings": self.row.evaluate,
            "seeds": self.row.evaluate_seeds,
            "batch_size": self.row.batch_size,
            "real_images": self.plan.real_images,
            "detector": str(detector) if is_detector_name(detector) else getattr(detector, "name", "file"),
            "tf32": self.row.tf32,
        }

    def cost(self, images: int, settings: Mapping[str, Any]) -> dict[str, int]:
        count = self.row.evaluations
        return {"images": images, **({"network_evaluations": images * count(settings)} if count else {})}


def with_data(row: Row, data: str | None) -> Prepare | None:
    """The row's `prepare`, from the files in the folder `data` where it is given. Raises UserError."""
    prepare: Any = row.prepare
    if data is None:
        return prepare
    if not hasattr(prepare, "data"):
        raise UserError(f"--data: {row.id} is not trained here on a data set; leave it out")
    return dataclasses.replace(prepare, data=data)


def _hashed_file(path: Path) -> Path:
    """The file whose hash stands for `path`: of a set's folder, its listing, which is written last."""
    return path / "dataset.json" if path.is_dir() else path
