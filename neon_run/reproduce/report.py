"""results.json and report.html of a run: one file that needs no other, written from the records of the stages."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from neon_core.seeds import parse_seeds
from neon_files.atomic import atomic_path, write_json
from neon_run.reproduce import charts
from neon_run.reproduce.ledger import STAGES, Ledger
from neon_run.reproduce.measure import LONGER, RANDOM, REAL
from neon_run.reproduce.pages import fid_text, page, settings_text, short
from neon_run.row import Row
from neon_run.search.quick import Settings
from neon_run.search.sweep import BASE

LAYOUT = 9  # counts up when a report of the same records would look different
METRICS = {
    "is_mean": ("IS", "{:.2f}"),
    "kid_mean": ("KID x 1000", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
}


def collect(row: Row, ledger: Ledger, versions: Mapping[str, str]) -> dict[str, Any]:
    """All results and settings of a run, as JSON; read from the records, so that it is the same at every restart."""
    records = {stage: record for stage in STAGES[:-1] if (record := ledger.record(stage)) is not None}
    search, measured = records["search"]["outputs"], records["evaluate"]["outputs"]
    return {
        "row": row.id,
        "paper": {"base_fid": row.base_fid, "neon_fid": row.neon_fid, "w": row.w},
        "distance": row.distance,
        "samples": records["evaluate"]["settings"]["samples"],
        "best": search["best"],
        "base_best": search["base_best"],
        "final": measured["final"],
        "intervals": measured["intervals"],
        "second_block": measured.get("second_block"),
        "acceptance": None if row.protocol.acceptance is None else dataclasses.asdict(row.protocol.acceptance),
        "points": {"search": search["points"], "evaluate": measured["points"]},
        "search": {"kind": records["search"]["settings"]["kind"], "images": search["images"]},
        "ledger": [_cost(records[stage]) for stage in STAGES[:-1]],
        "provenance": {
            "files": records["fetch"]["outputs"],
            "neon": records["merge"]["outputs"] | {"differs_from_measured_by": measured["file_differs_by"]},
            "snapshots": records["finetune"]["outputs"]["snapshots"],
            "generate": records["generate"]["settings"],
            "train": records["finetune"]["settings"]["train"],
            "evaluate": records["evaluate"]["settings"],
            "keys": {stage: record["key"] for stage, record in records.items()},
            "versions": dict(versions),
        },
    }


def _cost(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": record["stage"], "starts": record["starts"], "world_size": record["world_size"], **record["cost"]}


def write(results: Mapping[str, Any], out_dir: Path) -> None:
    """<out_dir>/results.json and report.html."""
    write_json(out_dir / "results.json", results)
    with atomic_path(out_dir / "report.html") as temporary:
        temporary.write_text(page("report.html", view(results, out_dir / "samples")), encoding="utf-8")


def view(results: Mapping[str, Any], samples: Path) -> dict[str, Any]:
    """What the template shows; `samples` is the folder of the three grids."""
    final, second, gain = results["final"], results["second_block"], results["intervals"]["gain"]
    parts = {
        "result": _result(results),
        "curves": _curves(results),
        "surfaces": _surfaces(results),
        "controls": _controls(results),
        "samples": _samples(samples, results),
        "cost": _cost_table(results["ledger"]),
    }
    searched = list(results["best"]["settings"])
    curve_title = ", ".join(["w", *searched[:-1]]) + f" and {searched[-1]}" if searched else "The curve over w"
    return {
        "title": results["row"],
        "contents": _contents(parts, curve_title),
        "curve_title": curve_title,
        **{name: results[name] for name in ("distance", "intervals", "best", "paper", "final")},
        "tuned": _own_best(results),
        "at_settings": settings_text(results["best"]["settings"]),
        "gain": gain,
        "improves": gain["low"] > 1e-9 * results["intervals"]["base"]["value"],  # more than rounding
        "second_block": second,
        "ends": second or final,
        "heldout": "fid_heldout" in final["neon"],
        "count": _equal_count(results),
        "kind_of_images": "images of seeds that no search has seen" if second else "images",
        **parts,
        "files": _files(results["provenance"]),
        "settings": _settings(results["provenance"]),
    }


def _contents(parts: Mapping[str, Any], curve_title: str) -> list[tuple[str, str]]:
    """(id, title) of the sections that the page has."""
    sections = [("result", "Result"), ("curve", curve_title), ("controls", "Controls"), ("samples", "Samples")]
    present = {**parts, "curve": parts["curves"] or parts["surfaces"]}
    return [*(section for section in sections if present[section[0]]), ("cost", "Cost"), ("provenance", "Provenance")]


def _result(results: Mapping[str, Any]) -> dict[str, Any]:
    second, final, distance = results["second_block"], results["final"], results["distance"]
    columns = [name for name in METRICS if name in final["neon"]]
    heldout = (second or final) if "fid_heldout" in final["neon"] else None
    head = ["", distance, "95 % interval", *([f"{distance}, other seeds"] if second else [])]
    head += [*(["held out"] if heldout else []), *(METRICS[name][0] for name in columns)]
    rows = []
    for name, label in (("base", "base"), ("neon", "Neon")):
        values, between = final[name], results["intervals"][name]
        cells = [label, fid_text(values["fid"]), f"{fid_text(between['low'])} to {fid_text(between['high'])}"]
        cells += [fid_text(second[name]["fid"])] if second else []
        cells += [fid_text(heldout[name]["fid_heldout"])] if heldout else []
        cells += [METRICS[c][1].format((1000 if c == "kid_mean" else 1) * values[c]) for c in columns]
        rows.append(cells)
    return {"head": head, "rows": rows}


def _curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The distance over w and, where there is a second reference, that to it."""
    best, measured = results["best"], _equal(results)
    line = [p for p in measured if p["snapshot"] in (best["snapshot"], BASE) and p["settings"] == best["settings"]]
    if len(line) < 2:
        return []
    searched = [(p["w"], p["fid"]) for p in _searched(results)]
    base_name = "base, re-tuned" if best["settings"] else "base"
    curves = []
    for name, dots, suffix in (("fid", searched, ""), ("fid_heldout", [], ", held out")):
        base = _fid(measured, BASE, 0.0, results["base_best"]["settings"], name)
        if name not in line[0] or base is None:
            continue
        curve = [(p["w"], p[name]) for p in line]
        drawn = charts.curve_over_w(curve, dots, best["w"], (base_name, base), results["distance"] + suffix)
        curves.append({"name": name, "svg": Markup(drawn)})
    return curves


def _surfaces(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The search's points over w and each of the settings that were searched with it."""
    best = results["best"]
    fewest = min(p["num_images"] for p in results["points"]["search"])
    ranked = [p for p in _searched(results) if p["num_images"] == fewest]
    drawn = [charts.surface(ranked, best, name, results["distance"]) for name in best["settings"]]
    svgs = [Markup(svg) for svg in drawn if svg]
    if not svgs:
        return None
    bar = charts.colour_bar(min(p["fid"] for p in ranked), max(p["fid"] for p in ranked))
    return {"svgs": svgs, "bar": Markup(bar), "count": fewest, "fitted": len(best["settings"]) == 1}


def _own_best(results: Mapping[str, Any]) -> str:
    """What "base" and a longer trained base are followed by: they have settings of their own."""
    names = list(results["best"]["settings"])
    return f", at its own best {', '.join(names)}" if names else ""


def _searched(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The search's points of the chosen snapshot, and of the base."""
    return [p for p in results["points"]["search"] if p["snapshot"] in (results["best"]["snapshot"], BASE)]


def _controls(results: Mapping[str, Any]) -> dict[str, Any] | None:
    best, of_base, measured = results["best"], results["base_best"]["settings"], _equal(results)
    tuned, snapshot, w, settings = _own_best(results), best["snapshot"], best["w"], best["settings"]
    lines: tuple[tuple[str, tuple[str, float, Settings]], ...] = (
        (f"base{tuned}", (BASE, 0.0, of_base)),
        (f"base, at Neon's {', '.join(settings)}", (BASE, 0.0, settings)),
        *(
            (label, (*place, chosen))
            for label, place in (
                ("self-trained (w = -1)", (snapshot, -1.0)),
                ("random direction of equal length", (RANDOM, w)),
                ("away from real data, equal w", (REAL, w)),
                ("as much more training on real data", (REAL, -1.0)),
                ("base trained twice as long", (LONGER, -1.0)),
            )
            for chosen in (settings, of_base)
        ),
        (f"Neon (w = {w:.4g})", (snapshot, w, settings)),
    )
    base, heldout = _fid(measured, *lines[0][1]), any("fid_heldout" in point for point in measured)
    rows: list[list[str]] = []
    listed: list[tuple[str, float, Settings]] = []
    for label, point in lines:
        fid = _fid(measured, *point)
        if fid is None or base is None or point in listed:
            continue
        other = _fid(measured, *point, "fid_heldout")
        varied = [short(value) for value in point[2].values()]
        rows.append([label, *varied, fid_text(fid), _signed(fid - base), *([] if other is None else [fid_text(other)])])
        listed.append(point)
    if len(rows) < 3:
        return None
    head = ["", *settings, f"{results['distance']} of {_equal_count(results):,}", "against the base"]
    return {"head": [*head, *(["held out"] if heldout else [])], "rows": rows}


def _samples(folder: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three grids: label, columns, pictures with the seed of each."""
    labels = {"base": "base", "self-trained": "self-trained, w = -1", "neon": f"Neon, w = {results['best']['w']:.4g}"}
    rows, columns = results["samples"]
    if not rows * columns:
        return []
    seeds = parse_seeds(results["final"]["neon"]["seeds"])[: rows * columns]
    grids = []
    for name, label in labels.items():
        paths = [path for path in sorted((folder / name).glob("*.png")) if path.stem.isdigit()]
        codes = [base64.b64encode(path.read_bytes()).decode() for path in paths]
        pictures = [{"seed": seed, "code": code} for seed, code in zip(seeds, codes, strict=False)]
        grids.append({"label": label, "columns": columns, "pictures": pictures})
    return grids


def _cost_table(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = {key: sum(cost.get(key, 0) for cost in costs) for key in ("seconds", "images", "network_evaluations")}
    rows = []
    for cost in costs:
        share = 100 * cost["seconds"] / max(total["seconds"], 1e-9)
        trained = cost.get("training_images")
        images = f"{cost['images']:,}" if cost.get("images") else (f"{trained:,} trained on" if trained else "-")
        passes = _or_dash(cost.get("network_evaluations"))
        cells = [cost["stage"], f"{cost['seconds']:,.0f}", f"{share:.1f} %", images, passes]
        rows.append([*cells, str(cost["world_size"]), str(cost["starts"])])
    passes = _or_dash(total["network_evaluations"])
    rows.append(["all", f"{total['seconds']:,.0f}", "100 %", f"{total['images']:,}", passes, "", ""])
    return {
        "head": ["stage", "seconds", "share", "images sampled", "network evaluations", "processes", "starts"],
        "rows": rows,
        "trained_here": any(cost["stage"] == "fetch" and "training_images" in cost for cost in costs),
    }


def _or_dash(count: int | None) -> str:
    return f"{count:,}" if count else "-"


def _files(provenance: Mapping[str, Any]) -> list[list[str]]:
    rows = [[name, Path(entry["path"]).name, entry["sha256"]] for name, entry in provenance["files"].items()]
    rows += [["snapshot", Path(name).name, value] for name, value in provenance["snapshots"].items()]
    return [*rows, ["Neon", provenance["neon"]["path"], provenance["neon"]["sha256"]]]


def _settings(provenance: Mapping[str, Any]) -> str:
    shown = {name: provenance[name] for name in ("generate", "train", "evaluate", "versions", "keys")}
    return json.dumps(shown, indent=1, sort_keys=True)


def _equal_count(results: Mapping[str, Any]) -> int:
    """The number of images at which every control was measured."""
    return min(p["num_images"] for p in results["points"]["evaluate"])


def _equal(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points at that number, of the block of seeds that the search has not seen, if there is one."""
    count, block = _equal_count(results), "second" if results["second_block"] else "first"
    return [p for p in results["points"]["evaluate"] if p["num_images"] == count and p["block"] == block]


def _fid(
    points: Sequence[Mapping[str, Any]], snapshot: str, w: float, settings: Settings, name: str = "fid"
) -> float | None:
    snapshot = BASE if w == 0 else snapshot
    values = [p.get(name) for p in points if (p["snapshot"], p["w"], p["settings"]) == (snapshot, w, settings)]
    return values[0] if values else None


def _signed(difference: float) -> str:
    return f"{'+' if difference > 0 else ''}{fid_text(difference)}" if difference else ""
