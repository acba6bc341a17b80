"""results.json and report.html of a run: one file that needs no other, written from the records of the stages."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from neon_files.atomic import atomic_path, write_json
from neon_run.reproduce import charts
from neon_run.reproduce.ledger import STAGES, Ledger
from neon_run.reproduce.measure import RANDOM, REAL
from neon_run.reproduce.style import STYLE
from neon_run.row import Row
from neon_run.search.sweep import BASE

LAYOUT = 4  # counts up when a report of the same records would look different
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
    records = {stage: ledger.record(stage) for stage in STAGES[:-1]}
    search, measured = records["search"]["outputs"], records["evaluate"]["outputs"]
    return {
        "row": row.id,
        "paper": {"base_fid": row.base_fid, "neon_fid": row.neon_fid, "w": row.w},
        "guidance": row.guidance,
        "distance": row.distance,
        "samples": records["evaluate"]["settings"]["samples"],
        "best": search["best"],
        "base_best": search["base_best"],
        "final": measured["final"],
        "intervals": measured["intervals"],
        "second_block": measured.get("second_block"),
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
        temporary.write_text(html(results, out_dir / "samples"), encoding="utf-8")


def html(results: Mapping[str, Any], samples: Path) -> str:
    """The report; `samples` is the folder of the three grids."""
    sections = [
        _headline(results),
        _final_table(results),
        _plots(results),
        _controls(results),
        _samples(samples, results),
        _ledger(results["ledger"]),
        _provenance(results["provenance"]),
    ]
    title = f"Neon: {escape(results['row'])}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{STYLE}</style></head>\n<body><main>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _headline(results: Mapping[str, Any]) -> str:
    intervals, best, paper = results["intervals"], results["best"], results["paper"]
    base, neon, gain = (intervals[name] for name in ("base", "neon", "gain"))
    difference = f"{_fid_text(gain['value'])} ± {_fid_text(1.96 * gain['standard_error'])}"
    verdict = (
        f"Neon lowers the {results['distance']} by {difference}."
        if gain["low"] > 1e-9 * base["value"]  # more than rounding
        else f"No improvement is shown: the {results['distance']} falls by {difference}."
    )
    ends = results["second_block"] or results["final"]
    if results["second_block"]:
        verdict += f" On seeds that no search has seen: {_from_to(ends, 'fid')}."
    if "fid_heldout" in ends["neon"]:
        verdict += f" Against held-out images, on which nothing was chosen: {_from_to(ends, 'fid_heldout')}."
    stated = "" if paper["neon_fid"] is None else f" In the paper: {_or_dash(paper['base_fid'])} → {paper['neon_fid']}."
    guided = "" if best["guidance"] is None else f", {escape(results['guidance'])} = {best['guidance']:.4g}"
    tuned = ", at its own best guidance" if results["guidance"] else ""
    cards = "".join(
        f'<div class="card {kind}"><b>{_fid_text(value["value"])}</b>'
        f"<span>± {_fid_text(1.96 * value['standard_error'])}</span><em>{label}</em></div>"
        for kind, label, value in (("", f"base{tuned}", base), ("neon", "Neon", neon))
    )
    return (
        f"<header><h1>{escape(results['row'])}</h1><p>{verdict}{stated}</p></header>"
        f'<div class="cards">{cards}<div class="card"><b>{best["w"]:.4g}</b><span>w{guided}</span>'
        f"<em>{escape(best['snapshot'])}</em></div></div>"
    )


def _final_table(results: Mapping[str, Any]) -> str:
    second, intervals = results["second_block"], results["intervals"]
    columns = [name for name in METRICS if name in results["final"]["neon"]]
    distance = results["distance"]
    head = ["", distance, "95 % interval", *([f"{distance}, other seeds"] if second else [])]
    heldout = (second or results["final"]) if "fid_heldout" in results["final"]["neon"] else None
    head += ["held out"] if heldout else []
    head += [METRICS[c][0] for c in columns]
    rows = []
    for name, label in (("base", "base"), ("neon", "Neon")):
        values, between = results["final"][name], intervals[name]
        cells = [label, _fid_text(values["fid"]), f"{_fid_text(between['low'])} to {_fid_text(between['high'])}"]
        cells += [_fid_text(second[name]["fid"])] if second else []
        cells += [_fid_text(heldout[name]["fid_heldout"])] if heldout else []
        for column in columns:
            factor = 1000 if column == "kid_mean" else 1
            cells.append(METRICS[column][1].format(factor * values[column]))
        rows.append(cells)
    caption = f"All of seeds {escape(results['final']['neon']['seeds'])}"
    caption += f"; other seeds: {escape(second['neon']['seeds'])}, which no search has seen." if second else "."
    if heldout:
        caption += " Held out: the same distance to a second reference"
        caption += ", of the other seeds." if second else "."
    note = (
        "The interval is 1.96 standard errors of a bootstrap over blocks of whole batches; base and Neon share seeds, "
        "and the interval of their difference uses that."
    )
    return f"<section><h2>Result</h2>{_table(head, rows)}<p class=small>{caption} {note}</p></section>"


def _plots(results: Mapping[str, Any]) -> str:
    figures = [*_curves(results), *_surface(results)]
    title = "w and guidance" if results["guidance"] else "The curve over w"
    return f'<section><h2>{title}</h2><div class="figures">{"".join(figures)}</div></section>' if figures else ""


def _curves(results: Mapping[str, Any]) -> list[str]:
    """The distance over w and, where there is a second reference, that to it."""
    best, measured = results["best"], _equal(results)
    line = [p for p in measured if p["snapshot"] in (best["snapshot"], BASE) and p["guidance"] == best["guidance"]]
    if len(line) < 2:
        return []
    searched = [(p["w"], p["fid"]) for p in _searched(results)]
    measured_text = f"{results['distance']} of {_equal_count(results):,} {_kind_of_images(results)}"
    where = " at Neon's guidance" if results["guidance"] else ""
    figures = []
    for name, dots, caption in (
        ("fid", searched, f"Over w{where}: {measured_text}. Small grey dots: the search."),
        ("fid_heldout", [], "The same images against held-out ones, on which nothing was chosen."),
    ):
        if name not in line[0]:
            continue
        curve = [(p["w"], p[name]) for p in line]
        tuned = "base, re-tuned" if results["guidance"] else "base"
        base = _fid(measured, BASE, 0.0, results["base_best"]["guidance"], name)
        label = results["distance"] + (", held out" if name == "fid_heldout" else "")
        drawn = charts.curve_over_w(curve, dots, best["w"], (tuned, base), label)
        figures.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    return figures


def _surface(results: Mapping[str, Any]) -> list[str]:
    """The search's points over (w, guidance), where guidance was searched."""
    best = results["best"]
    if best["guidance"] is None:
        return []
    fewest = min(p["num_images"] for p in results["points"]["search"])
    ranked = [p for p in _searched(results) if p["num_images"] == fewest]
    drawn = charts.surface(ranked, (best["w"], best["guidance"]), results["guidance"], results["distance"])
    if not drawn:
        return []
    caption = (
        f"The search's points, {results['distance']} of {fewest:,} images, over the quadratic that fits them; "
        "ring: chosen. Where the bright valley rises to the right, more w wants more guidance; where it falls, less."
    )
    bar = charts.colour_bar(min(p["fid"] for p in ranked), max(p["fid"] for p in ranked))
    return [f"<figure>{drawn}{bar}<figcaption>{caption}</figcaption></figure>"]


def _searched(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The search's points of the chosen snapshot, and of the base."""
    return [p for p in results["points"]["search"] if p["snapshot"] in (results["best"]["snapshot"], BASE)]


def _controls(results: Mapping[str, Any]) -> str:
    best, measured, count = results["best"], _equal(results), _equal_count(results)
    tuned = ", at its own best guidance" if results["guidance"] else ""
    lines = (
        (f"base{tuned}", BASE, 0.0, results["base_best"]["guidance"]),
        ("base, at Neon's guidance", BASE, 0.0, best["guidance"]),
        ("self-trained (w = -1)", best["snapshot"], -1.0, best["guidance"]),
        ("random direction of equal length", RANDOM, best["w"], best["guidance"]),
        ("as much more training on real data", REAL, -1.0, best["guidance"]),
        (f"Neon (w = {best['w']:.4g})", best["snapshot"], best["w"], best["guidance"]),
    )
    base = _fid(measured, *lines[0][1:])
    rows, listed = [], set()
    for label, *point in lines:
        fid = _fid(measured, *point)
        if fid is not None and tuple(point) not in listed:
            other = _fid(measured, *point, "fid_heldout")
            guided = [_or_dash(point[2])] if results["guidance"] else []
            heldout = [] if other is None else [_fid_text(other)]
            rows.append([label, *guided, _fid_text(fid), _signed(fid - base), *heldout])
            listed.add(tuple(point))
    if len(rows) < 3:
        return ""
    head = ["", *([results["guidance"]] if results["guidance"] else [])]
    head += [f"{results['distance']} of {count:,}", "against the base", *(["held out"] if heldout else [])]
    caption = f"All on the same {_kind_of_images(results)}, so that bias and noise are shared."
    return f"<section><h2>Controls</h2>{_table(head, rows)}<p class=small>{caption}</p></section>"


def _samples(folder: Path, results: Mapping[str, Any]) -> str:
    labels = {"base": "base", "self-trained": "self-trained, w = -1", "neon": f"Neon, w = {results['best']['w']:.4g}"}
    rows, columns = results["samples"]
    if not rows * columns:
        return ""
    grids = []
    for name, label in labels.items():
        pictures = sorted((folder / name).glob("*.png"))[: rows * columns]
        coded = (base64.b64encode(path.read_bytes()).decode() for path in pictures)
        across = f'style="grid-template-columns: repeat({columns}, 1fr)"'
        images = "".join(f'<img alt="" src="data:image/png;base64,{code}">' for code in coded)
        grids.append(f"<div><h3>{escape(label)}</h3><div class=grid-of-images {across}>{images}</div></div>")
    caption = "Equal places have equal seeds, labels and guidance. Not selected: the first seeds of the evaluation."
    return f'<section><h2>Samples</h2><div class="samples">{"".join(grids)}</div><p class=small>{caption}</p></section>'


def _ledger(costs: Sequence[Mapping[str, Any]]) -> str:
    total = {key: sum(cost.get(key, 0) for cost in costs) for key in ("seconds", "images", "network_evaluations")}
    rows = []
    for cost in costs:
        share = 100 * cost["seconds"] / max(total["seconds"], 1e-9)
        trained = cost.get("training_images")
        images = f"{cost['images']:,}" if cost.get("images") else (f"{trained:,} trained on" if trained else "-")
        cells = [cost["stage"], f"{cost['seconds']:,.0f}", f"{share:.1f} %", images]
        cells += [f"{cost['network_evaluations']:,}" if cost.get("network_evaluations") else "-"]
        rows.append([*cells, str(cost["world_size"]), str(cost["starts"])])
    rows.append(["all", f"{total['seconds']:,.0f}", "100 %", f"{total['images']:,}", _thousands(total), "", ""])
    head = ["stage", "seconds", "share", "images sampled", "network evaluations", "processes", "starts"]
    caption = "Network evaluations: passes per sampled image, guidance counted; training is counted in images."
    if any(cost["stage"] == "fetch" and "training_images" in cost for cost in costs):
        caption += " Nothing is published for this row: its base was trained in the stage fetch."
    return f"<section><h2>Cost</h2>{_table(head, rows)}<p class=small>{caption}</p></section>"


def _thousands(total: Mapping[str, int]) -> str:
    return f"{total['network_evaluations']:,}" if total["network_evaluations"] else "-"


def _provenance(provenance: Mapping[str, Any]) -> str:
    rows = [[name, Path(entry["path"]).name, entry["sha256"]] for name, entry in provenance["files"].items()]
    rows += [["snapshot", Path(name).name, value] for name, value in provenance["snapshots"].items()]
    rows.append(["Neon", provenance["neon"]["path"], provenance["neon"]["sha256"]])
    files = _table(["", "file", "sha256"], rows, "hashes")
    rest = {name: provenance[name] for name in ("generate", "train", "evaluate", "versions", "keys")}
    text = escape(json.dumps(rest, indent=1, sort_keys=True))
    return (
        f"<section><h2>Provenance</h2>{files}<details><summary>Settings</summary><pre>{text}</pre></details></section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _equal_count(results: Mapping[str, Any]) -> int:
    """The number of images at which every control was measured."""
    return min(p["num_images"] for p in results["points"]["evaluate"])


def _equal(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points at that number, of the block of seeds that the search has not seen, if there is one."""
    count, block = _equal_count(results), "second" if results["second_block"] else "first"
    return [p for p in results["points"]["evaluate"] if p["num_images"] == count and p["block"] == block]


def _kind_of_images(results: Mapping[str, Any]) -> str:
    return "images of seeds that no search has seen" if results["second_block"] else "images"


def _fid(
    points: Sequence[Mapping[str, Any]], snapshot: str, w: float, guidance: float | None, name: str = "fid"
) -> float | None:
    snapshot = BASE if w == 0 else snapshot
    values = [p.get(name) for p in points if (p["snapshot"], p["w"], p["guidance"]) == (snapshot, w, guidance)]
    return values[0] if values else None


def _from_to(ends: Mapping[str, Any], name: str) -> str:
    return " → ".join(_fid_text(ends[end][name]) for end in ("base", "neon"))


def _fid_text(value: float) -> str:
    """Four decimals, as papers report FIDs; three digits where four decimals would show none."""
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _signed(difference: float) -> str:
    return f"{'+' if difference > 0 else ''}{_fid_text(difference)}" if difference else ""


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
