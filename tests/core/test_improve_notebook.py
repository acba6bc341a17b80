"""docs/improve_your_own.ipynb: its cells run as they stand, in the fast setting."""

import json
import runpy

import pytest
import torch
from launch import ROOT

from neon_files.checkpoint import read_checkpoint

NOTEBOOK = ROOT / "docs/improve_your_own.ipynb"


def test_the_cells_run_and_end_with_the_better_weights(tmp_path, monkeypatch):
    for package in ("diffusers", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("NEON_NOTEBOOK", "fast")
    monkeypatch.setenv("NEON_NOTEBOOK_FOLDER", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10 and all(not cell.get("outputs") for cell in cells)
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), encoding="utf-8")
    with torch.random.fork_rng():
        names = runpy.run_path(str(script))
    written = read_checkpoint(names["result"].checkpoint).state
    assert all(torch.equal(value, written[name]) for name, value in names["net"].state_dict().items())
    assert names["result"].report.is_file()
