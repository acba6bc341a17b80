"""A row from its published files to its final FID: fetch, generate, finetune, search, merge, evaluate, report.

Each stage is one call of what the scripts call too. A stage that is on record with the same settings and inputs is not
done again; one that was stopped goes on, on any number of ranks. `neon_core.pipeline.ledger` has the files.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, is_main
from neon_core.errors import UserError
from neon_core.evaluate import Evaluator
from neon_core.files.atomic import sha256_file
from neon_core.files.image_set import ImageSet
from neon_core.files.published import obtain
from neon_core.merge import merge_files
from neon_core.metrics.detector import WEIGHTS_NAME, Detector, float32_precision
from neon_core.pipeline import measure, report
from neon_core.pipeline.growing import GrowingSweep
from neon_core.pipeline.ledger import Ledger
from neon_core.pipeline.rows import Row
from neon_core.pipeline.sweep import find_checkpoints
from neon_core.prepared import training_data
from neon_core.seeds import parse_seeds
from neon_core.selftrain import find_snapshots, self_train
from neon_core.synthetic import generate_set


@dataclass(frozen=True)
class Plan:
    """What a user may choose; the row says the rest. `None`: the row's own."""

    base: str | Path | None = None
    reference: str | Path | None = None
    tokenizer: str | Path | None = None
    detector: Detector | str | Path | None = None  # None: the published Inception
    real_images: str | Path | None = None  # for KID, precision and recall
    batch_size: int = 64
    seed: int = 0  # of the fine-tune and of the random control
    search: str = "quick"  # quick | grid
    snapshots: int = 4  # of the fine-tune, evenly spaced, that the quick search looks at
    ranking_images: int = 2_500
    deciding_images: int = 10_000
    second_block: bool = True  # base and Neon once more, on other seeds
    controls: bool = True
    real_training: str | Path | None = None  # a training set: the control of as much more training on real data
    resamples: int = 30


class Reproduction:
    """The stages of one row in one folder. Every rank makes the same calls."""

    def __init__(self, row: Row, out_dir: str | Path, plan: Plan, device: torch.device, command: str = ""):
        self.row, self.recipe, self.plan, self.device = row, row.recipe, plan, device
        self.out_dir = Path(out_dir)
        self.seeds = parse_seeds(row.recipe.evaluate_seeds)
        counts = (plan.ranking_images, plan.deciding_images, len(self.seeds))
        if not 2 <= counts[0] <= counts[1] <= counts[2]:
            raise UserError(
                f"--ranking_images {counts[0]}, --deciding_images {counts[1]} and the {counts[2]} seeds of the "
                "evaluation must not decrease in this order, and begin at 2 or more"
            )
        self.ledger = Ledger(self.out_dir)
        self.ledger.begin(row.id, command)

    def run(self) -> dict[str, Any]:
        """All stages; returns results.json. Raises UserError."""
        with float32_precision(self.row.tf32):
            files = self.fetch()
            self.files = {name: Path(entry["path"]) for name, entry in files.items()}
            self.base_sha256 = files["base"]["sha256"]
            self.generate()
            trained = self.finetune()
            self.snapshots = find_checkpoints(self.out_dir / "finetune")
            found = self.search(trained)
            self.merge(found)
            self.evaluate(found)
        return self.report()

    def fetch(self) -> dict[str, dict]:
        """Base, reference, tokenizer and detector, on this machine and known by their hashes."""
        wanted = {"base": self.plan.base or self.recipe.base, "reference": self.plan.reference or self.recipe.fid_stats}
        if self.plan.tokenizer:
            wanted["tokenizer"] = self.plan.tokenizer
        else:
            wanted |= {name: name for name in self.row.files}
        if self.plan.detector is None:
            wanted["detector"] = WEIGHTS_NAME
        elif isinstance(self.plan.detector, str | Path):
            wanted["detector"] = self.plan.detector
        paths = {name: obtain(path) for name, path in wanted.items()}
        known = {name: (str(p), p.stat().st_size, p.stat().st_mtime_ns) for name, p in paths.items()}

        def work() -> dict:
            hashes = broadcast_object({n: sha256_file(p) for n, p in paths.items()} if is_main() else None)
            return {"outputs": {n: {"path": str(paths[n]), "sha256": hashes[n]} for n in paths}}

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
                range(count),
                self.out_dir / "synthetic",
                settings=settings,
                batch_size=self.plan.batch_size,
                provenance=self.provenance,
            )
            return {"files": ["synthetic/dataset.json"], **self.cost(count, settings)}

        what = {"count": count, "settings": settings, "batch_size": self.plan.batch_size}
        return self.ledger.run("generate", what, ["fetch"], work)

    def finetune(self) -> dict:
        def work() -> dict:
            _ = self.evaluator
            backbone = self.load()
            images = ImageSet(self.out_dir / "synthetic", use_labels=backbone.num_classes > 0)
            data = training_data(backbone, images, self.device)
            made = self_train(
                backbone,
                data,
                self.recipe.train,
                self.out_dir / "finetune",
                seed=self.plan.seed,
                device=self.device,
                provenance={**self.provenance, "set": images.digest},
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
            "images": [self.plan.ranking_images, self.plan.deciding_images],
            "trained": trained["snapshots"],
            "row": [self.row.w_range, self.row.guidance, self.row.guidance_range, self.recipe.w],
            **self.measured_with,
        }
        if self.plan.search == "grid":
            what["grid"] = self.row.grid

        def work() -> dict:
            found = measure.find(self.row, self.plan, self.sweep, self.seeds)
            return {"outputs": found, **self.cost(found["images"], self.recipe.evaluate)}

        return self.ledger.run("search", what, ["finetune"], work)

    def merge(self, found: dict) -> dict:
        best, out = found["best"], self.out_dir / "neon.safetensors"

        def work() -> dict:
            if is_main():
                merge_files(self.files["base"], self.snapshots[best["snapshot"]], best["w"], out)
            barrier()
            outputs = broadcast_object({"path": out.name, "sha256": sha256_file(out)} if is_main() else None)
            return {"outputs": outputs, "files": [out.name]}

        return self.ledger.run("merge", {"snapshot": best["snapshot"], "w": best["w"]}, ["search"], work)

    def evaluate(self, found: dict) -> dict:
        what = {
            "second_block": self.plan.second_block,
            "controls": self.plan.controls,
            "real_training": self.plan.real_training,
            "resamples": self.plan.resamples,
            "seed": self.plan.seed,
            **self.measured_with,
        }

        def work() -> dict:
            trained = {}
            if self.plan.real_training:
                path = self.train_on_real(found["best"]["snapshot"])
                self.sweep.snapshots[measure.REAL] = path
                trained["training_images"] = max(find_snapshots(path.parent))
            measured = measure.final(self.row, self.plan, self.sweep, self.seeds, found, self.out_dir)
            return {"outputs": measured, **self.cost(measured["images"], self.recipe.evaluate), **trained}

        return self.ledger.run("evaluate", what, ["search", "merge"], work)

    def train_on_real(self, snapshot: str) -> Path:
        """The base trained on real images as long, and in the same way, as `snapshot` was on synthetic ones."""
        self.__dict__.pop("sweep", None)  # one network in memory at a time
        length = {path.stem: seen for seen, path in find_snapshots(self.out_dir / "finetune").items()}[snapshot]
        backbone = self.load()
        images = ImageSet(self.plan.real_training, use_labels=backbone.num_classes > 0)
        made = self_train(
            backbone,
            training_data(backbone, images, self.device, cache_dir=self.out_dir / "controls" / "prepared"),
            dataclasses.replace(self.recipe.train, images=length),
            self.out_dir / "controls" / "real-data",
            seed=self.plan.seed,
            device=self.device,
            provenance={**self.provenance, "set": images.digest},
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
        metrics = ["fid", *(["kid", "prdc"] if self.plan.real_images else [])]
        options = {"device": self.device, "detector": detector, "real_images": self.plan.real_images}
        made = Evaluator(self.files["reference"], metrics=metrics, **options)
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
