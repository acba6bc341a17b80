"""The tables and pictures of docs/evidence.md, from the finished runs of `make evidence`.

    python benchmarks/evidence.py [--runs runs/evidence] [--images docs/images]

Prints a table per row and writes evidence.json (every distance and ratio) beside the runs, and one picture per row: the
same seeds and classes drawn by the base, the self-trained network and Neon of the first training seed, all at Neon's
guidance, above real images that nothing was trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from neon_files.atomic import atomic_path, write_json
from neon_run.fashion.data import CLASSES, NUM_CLASSES, load_fashion
from neon_run.reproduce import acceptance
from neon_run.reproduce.compare import read_runs

SIDE, LINES, SCALE, MARGIN = 16, 2, 3, 2  # pixels; lines of pictures per network
NETWORKS = {"base": "base", "self-trained": "self-trained", "neon": "Neon"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--data", help="folder of the idx files")
    args = parser.parse_args()
    real = load_fashion(args.data)
    record = {}
    for folder in sorted({path.parent.parent for path in args.runs.rglob("seed-*/results.json")}):
        runs = read_runs(sorted(folder.glob("seed-*")))
        results = [run.results for run in runs]
        name = results[0]["row"]
        record[name] = {run.name: summary(run.results) for run in runs} | {"gain": acceptance.gains(results)}
        print(f"\n{name}\n\n{table(runs)}\n")
        gain = record[name]["gain"]
        if gain:
            low, high = -100 * gain["high"], -100 * gain["low"]
            change = f"{-100 * gain['mean']:+.1f} % ({low:+.1f} to {high:+.1f})"
            print(f"Neon against the base: {change}, {gain['sigmas']:.1f} standard errors")
        for run in runs:
            for problem in acceptance.failures(run.results):
                print(f"{run.name}: {problem}")
        draw(folder / runs[0].name / "samples", real, args.images / f"evidence_{name.replace('/', '_')}.png")
    write_json(args.runs / "evidence.json", record)


def summary(results: dict) -> dict:
    keys = ("best", "base_best", "acceptance")
    minutes = {cost["stage"]: round(cost["seconds"] / 60, 2) for cost in results["ledger"]}
    measured = {"distances": acceptance.distances(results), "ratios": acceptance.ratios(results)}
    return {**{key: results[key] for key in keys}, **measured, "minutes": minutes}


def table(runs) -> str:
    """Markdown: a line per run with the distance on both blocks, and the ratios."""
    found = [acceptance.distances(run.results) for run in runs]
    names = [name for name in acceptance.PLACES if all(name in one for one in found)]
    lines = ["| training seed | " + " | ".join(acceptance.PLACES[name] for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for run, one in zip(runs, found, strict=True):
        cells = [", ".join(f"{value:.2f}" for value in one[name]) for name in names]
        lines.append(f"| {run.name.removeprefix('seed-')} | " + " | ".join(cells) + " |")
    shares = [acceptance.ratios(run.results) for run in runs]
    cells = [f"{np.mean([s[n] for s in shares]):.2f} ± {np.std([s[n] for s in shares], ddof=1):.2f}" for n in names]
    lines.append("| ratio to the base | " + " | ".join(["1", *cells[1:]]) + " |")
    return "\n".join(lines)


def draw(samples: Path, real, out: Path) -> None:
    """One picture: a group of `LINES` lines per network and of real images, a column per class."""
    groups = {}
    for folder, label in NETWORKS.items():
        pictures = [PIL.Image.open(samples / folder / f"{i:02d}.png").convert("L") for i in range(LINES * NUM_CLASSES)]
        groups[label] = [np.asarray(picture) for picture in pictures]
    by_class = [np.flatnonzero(real.heldout_labels.numpy() == label) for label in range(NUM_CLASSES)]
    groups["real"] = [real.heldout_images[by_class[i % NUM_CLASSES][i // NUM_CLASSES], 0].numpy()
                      for i in range(LINES * NUM_CLASSES)]  # fmt: skip
    step, left, top = SIDE * SCALE + MARGIN, 90, 16
    canvas = PIL.Image.new("L", (left + NUM_CLASSES * step, top + len(groups) * (LINES * step + 8)), 255)
    pen = PIL.ImageDraw.Draw(canvas)
    for column, name in enumerate(CLASSES):
        pen.text((left + column * step, 2), name[:8], fill=60)
    for row, (label, pictures) in enumerate(groups.items()):
        y = top + row * (LINES * step + 8)
        pen.text((4, y + step - 6), label, fill=0)
        for i, pixels in enumerate(pictures):
            large = PIL.Image.fromarray(pixels).resize((SIDE * SCALE, SIDE * SCALE), PIL.Image.Resampling.NEAREST)
            canvas.paste(large, (left + i % NUM_CLASSES * step, y + i // NUM_CLASSES * step))
    with atomic_path(out) as temporary:
        canvas.save(temporary, format="png")
    print(out)


if __name__ == "__main__":
    main()
