"""A run killed in every stage, on changing numbers of ranks, ends with the numbers of an unbroken one."""

import json
from pathlib import Path

import pytest
from core.pico_rows import CPU, PLAN, make_files, pico_row
from launch import kill_when, launch, start

from neon_run.reproduce.ledger import status
from neon_run.reproduce.reproduction import Reproduction

SCRIPT = Path("tests/core/pico_reproduce.py")


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def test_killed_in_every_stage_on_other_numbers_of_ranks(tmp_path):
    """Slowed down so that each start can be killed in its stage. The fine-tune keeps to one process, since sums over
    ranks round differently and so do its weights."""
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    make_files(files)
    unbroken = Reproduction(pico_row(files), tmp_path / "unbroken", PLAN, CPU).run()
    stages = (
        ("generate", 2, 0.2, lambda: count(out / "synthetic", "**/*.png") >= 3),
        ("finetune", 0, 0.1, lambda: (out / "finetune/state.pt").exists()),
        ("search", 2, 0.1, lambda: count(out / "search/points", "*.json") >= 3),
        ("evaluate", 0, 0.05, lambda: count(out / "search/points", "*-n200-*.json") >= 1),
    )
    for stage, ranks, pause, reached in stages:
        process = start(SCRIPT, files, out, ranks=ranks, PICO_PAUSE=pause)
        kill_when(process, reached, seconds=150)
        assert f"next: {stage};" in status(out)
    done = launch(SCRIPT, files, out, ranks=2)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    for key, value in unbroken["best"].items():
        assert results["best"][key] == (value if key == "snapshot" else pytest.approx(value, rel=1e-9))
    for name in ("base", "neon", "gain"):
        assert results["intervals"][name] == pytest.approx(unbroken["intervals"][name], rel=1e-6)
    for name in ("base", "neon"):
        for key in ("fid", "is_mean", "is_std"):
            assert results["final"][name][key] == pytest.approx(unbroken["final"][name][key], rel=1e-6)
    costs = {cost["stage"]: cost for cost in results["ledger"]}
    assert [costs[stage]["starts"] for stage, *_ in stages] == [2, 2, 2, 2]
    assert {stage: cost.get("images") for stage, cost in costs.items()} == {
        cost["stage"]: cost.get("images") for cost in unbroken["ledger"]
    }
    assert "complete:" in status(out)
