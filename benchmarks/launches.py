"""What one batch of sampling asks of a GPU, for every row at full size, without a GPU and without weights.

python benchmarks/launches.py            (a table: launches, weight casts, host syncs, uploads, peak memory)
python benchmarks/launches.py xar        (rows whose name begins so)

Launches are kernels and copies: every operation but views and allocations. Operations that PyTorch fuses into one call
(attention, normalisation) count once. Numbers of a row are exact at a few steps and, as they are linear in the steps,
extended to the row's own number.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "tests", "VAR", "xAR", "edm", "imm")]

from gpu_free.fake_cuda import GIB, Record, fake_cuda
from gpu_free.published import ROWS, Published

FEW = (3, 4)  # steps at which a row is counted


def measure(row: Published, record: Record, backbone, **settings) -> dict[str, float]:
    record.reset()
    row.sampling(backbone, **settings)
    return {
        "launches": record.launches,
        "casts": record.weight_casts,
        "syncs": sum(record.syncs.values()),
        "uploads": record.uploads,
        "peak": record.peak / GIB,
    }


def batch(row: Published, record: Record) -> tuple[int, dict[str, float]]:
    """(network calls, counts) of one batch with the row's own settings."""
    backbone = row.build()
    if not row.steps:
        return row.calls(0), measure(row, record, backbone)
    steps = row.settings[row.steps]
    a, b = (measure(row, record, backbone, **{row.steps: few}) for few in FEW)
    counts = {key: a[key] + (b[key] - a[key]) * (steps - FEW[0]) for key in a}
    return row.calls(steps), counts | {"peak": max(a["peak"], b["peak"])}


def main() -> None:
    wanted = tuple(sys.argv[1:]) or ("",)
    print("| row | batch | network calls | launches | per call | weight casts | syncs | uploads | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        if not name.startswith(wanted):
            continue
        with fake_cuda() as record:
            calls, n = batch(row, record)
        print(
            f"| {name} | {row.batch} | {calls} | {n['launches']:,} | {n['launches'] / calls:,.0f} | {n['casts']:,} "
            f"| {n['syncs']} | {n['uploads']} | {n['peak']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
