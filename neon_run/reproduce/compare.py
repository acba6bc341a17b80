"""`neon compare`: one page over several runs of `neon reproduce`, from their results.json.

Two distances compare only where they are of one kind, to one reference, in one detector's features and of equally many
images: runs that differ in these stand in groups of their own. Where the runs of a group are of one row (seeds of one
experiment), their mean and standard deviation stand below.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from neon_core.seeds import parse_seeds
from neon_files.atomic import atomic_path
from neon_files.errors import UserError
from neon_files.run_files import read_record
from neon_run.reproduce import acceptance, charts
from neon_run.reproduce.pages import fid_text, margin, page, settings_text, short
from neon_run.results import upgraded

NEEDED = {
    "row": str,
    "distance": str,
    "best": dict,
    "intervals": dict,
    "final": dict,
    "provenance": dict,
    "points": dict,
}
SETTINGS = ("generate", "train", "evaluate", "versions")


@dataclass(frozen=True)
class Run:
    name: str
    results: Mapping[str, Any]

    @property
    def scale(self) -> tuple[str, str, str, int]:
        """What two distances must share to be compared."""
        files = self.results["provenance"]["files"]
        reference, detector = (files.get(name, {}).get("sha256", "") for name in ("reference", "detector"))
        return self.results["distance"], reference, detector, len(parse_seeds(self.results["final"]["neon"]["seeds"]))

    @property
    def numbers(self) -> dict[str, float]:
        """Of this run: base, Neon, what Neon gains, w."""
        ends = {name: self.results["intervals"][name]["value"] for name in ("base", "neon", "gain")}
        return {**ends, "share": 100 * ends["gain"] / ends["base"], "w": self.results["best"]["w"]}


def write_comparison(folders: Sequence[Path], out: Path) -> list[str]:
    """The page `out`; returns one line per run for the terminal. Raises UserError."""
    runs = read_runs(folders)
    with atomic_path(out) as temporary:
        temporary.write_text(page("compare.html", view(runs)), encoding="utf-8")
    lines = [" | ".join([run.name, *_cells(run)]) for run in runs]
    return [*lines, *(line for verdict in _verdicts(runs) for line in verdict["lines"])]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished runs in these folders, by the folders' names, or by as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise UserError("compare: name two or more different runs, the --out folders of `neon reproduce`")
    endings = ([Path(*path.parts[-depth:]).as_posix() for path in paths] for depth in itertools.count(1))
    names = next(names for names in endings if len(set(names)) == len(names))
    return [Run(name, _read(folder)) for name, folder in zip(names, folders, strict=True)]


def _read(folder: Path) -> dict[str, Any]:
    try:
        return upgraded(read_record(folder / "results.json", NEEDED))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: holds no results.json; name the --out folder of a finished run (`neon status {folder}`)"
        ) from None


def view(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows."""
    scales = dict.fromkeys(run.scale for run in runs)
    groups = [_group(number, [run for run in runs if run.scale == scale]) for number, scale in enumerate(scales, 1)]
    if len(groups) == 1:
        groups[0]["title"] = "Runs"
    verdicts = _verdicts(runs)
    fresh = [("fresh", "On seeds that no search has seen")] if verdicts else []
    contents = [*((group["id"], group["title"]) for group in groups), *fresh, ("settings", "What differs")]
    parts = {"groups": groups, "verdicts": verdicts, "differing": _differing(runs)}
    return {"title": f"{len(runs)} runs", "contents": contents, **parts}


def _group(number: int, runs: Sequence[Run]) -> dict[str, Any]:
    distance, reference, _, count = runs[0].scale
    intervals = [(run.name, run.results["intervals"]["base"], run.results["intervals"]["neon"]) for run in runs]
    tuned = any(run.results["best"]["settings"] for run in runs)
    rows = [[run.name, *_cells(run, tuned)] for run in runs]
    one_row = len(runs) > 1 and len({run.results["row"] for run in runs}) == 1
    if one_row:
        rows.append(["mean ± sd", runs[0].results["row"], *_mean_cells(runs), *([""] if tuned else []), ""])
    alone = [run.name for run in runs] if len(runs) == 1 else []
    head = ["run", "row", f"base {distance}", f"Neon {distance}", "gain", "gain, %", "w"]
    return {
        "id": f"group-{number}",
        "title": ": ".join([*alone, f"{distance} of {count:,} images"])
        + (f", reference {reference[:8]}" if reference else ""),
        "distance": distance,
        "count": count,
        "head": [*head, *(["sampler"] if tuned else []), "snapshot"],
        "rows": rows,
        "several": len(runs) if one_row else 0,
        "svg": Markup(charts.runs(intervals, distance)),
    }


def _verdicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each row; its runs may have references of their own, since only ratios are put together."""
    rows = dict.fromkeys(run.results["row"] for run in runs)
    found = [_verdict(row, [run for run in runs if run.results["row"] == row]) for row in rows]
    return [verdict for verdict in found if verdict]


def _verdict(row: str, runs: Sequence[Run]) -> dict[str, Any] | None:
    """Runs of one row against the base at its own best, on seeds that no search has seen: a table with mean and
    standard deviation of the ratios, and sentences. None where nothing was measured on such seeds."""
    table = [acceptance.distances(run.results) for run in runs]
    names = [name for name in acceptance.PLACES if all(name in found for found in table)]
    if len(names) < 3:
        return None
    base = acceptance.BASE_OWN_BEST
    rows = []
    for run, found in zip(runs, table, strict=True):
        texts = [" / ".join(fid_text(value) for value in found[name]) for name in names]
        rows.append([run.name, *texts])
    shares = [acceptance.ratios(run.results) for run in runs]
    others = [name for name in names if name != base]
    if len(runs) > 1:
        spread = {name: np.array([share[name] for share in shares]) for name in others}
        cells = [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in spread.values()]
        rows.append(["ratio to the base", "1", *cells])
    lines = [f"{run.name}: {problem}" for run in runs for problem in acceptance.failures(run.results)]
    if runs[0].results.get("acceptance") and not lines:
        lines.append(f"the claim of {row} holds in {f'all {len(runs)} runs' if len(runs) > 1 else 'this run'}")
    gain = acceptance.gains([run.results for run in runs])
    if gain:
        word = "beats" if gain["sigmas"] >= acceptance.SIGMAS else "does NOT beat"
        lines.append(
            f"{row}: Neon {word} the base at its own best by {acceptance.SIGMAS:g} standard errors: "
            f"{100 * gain['mean']:.1f} % lower, 95 % interval {100 * gain['low']:.1f} to {100 * gain['high']:.1f} % "
            f"over {len(runs)} runs, {gain['sigmas']:.1f} standard errors"
        )
    return {"row": row, "head": ["run", *(acceptance.PLACES[name] for name in names)], "rows": rows, "lines": lines}


def _cells(run: Run, tuned: bool = True) -> list[str]:
    results = run.results
    intervals, best = results["intervals"], results["best"]
    ends = [f"{fid_text(intervals[n]['value'])} ± {margin(intervals[n])}" for n in ("base", "neon", "gain")]
    settings = [short(best["w"]), *([settings_text(best["settings"]) or "-"] if tuned else []), best["snapshot"]]
    return [results["row"], *ends, f"{run.numbers['share']:.1f}", *settings]


def _mean_cells(runs: Sequence[Run]) -> list[str]:
    """Mean and standard deviation (n - 1) of base, Neon, gain, gain in percent and w."""
    table = np.array([list(run.numbers.values()) for run in runs])
    texts = (fid_text, fid_text, fid_text, "{:.1f}".format, "{:.4g}".format)
    pairs = zip(texts, table.mean(0), table.std(0, ddof=1), strict=True)
    return [f"{text(mean)} ± {text(deviation)}" for text, mean, deviation in pairs]


def _differing(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The settings in which the runs differ, one line each; None where there are none."""
    tables = [_flat({name: run.results["provenance"][name] for name in SETTINGS}) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(table.get(name, "-") for table in tables)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return {"head": ["setting", *(run.name for run in runs)], "rows": rows} if rows else None


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """{"train.lr": "0.001"}: every leaf as text."""
    if isinstance(value, dict):
        inner = [_flat(part, f"{name}.{key}" if name else key) for key, part in value.items()]
        return {key: text for part in inner for key, text in part.items()}
    return {name: value if isinstance(value, str) else json.dumps(value)}
