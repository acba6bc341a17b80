"""`neon check`: numbers of tiny networks, ranks, and rows with random weights, on a CPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from neon_files.errors import UserError
from neon_run.backbones import backbone_of, find_backbones, find_row
from neon_run.check import command, golden, numbers, speed
from neon_run.check.speed import Effort, measure
from neon_run.command import neon

CPU = torch.device("cpu")


def test_the_numbers_of_every_backbone_are_as_recorded():
    found = golden.differences(CPU)
    assert {name.split()[0] for name in found} == {"metrics", *(commands.name for commands in find_backbones())}
    assert max(found.values()) < golden.LIMIT / 10, found


def tf32(name, shape):
    """Weights with TF32's ten bits of mantissa."""
    bits = TENSOR_FOR(name, shape).view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


TENSOR_FOR = numbers.tensor_for


def test_less_than_float32_is_noticed_in_every_backbone(monkeypatch):
    monkeypatch.setattr(numbers, "tensor_for", tf32)
    found = golden.differences(CPU)
    for group in ("metrics", *(commands.name for commands in find_backbones())):
        assert max(value for name, value in found.items() if name.startswith(group)) > golden.LIMIT


def test_rows_are_measured_without_files_and_without_network(tmp_path, offline):
    out = tmp_path / "check.json"
    result = CliRunner().invoke(
        neon, ["check", "edm/digits", "--batch_size", "4", "--device", "cpu", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "\nnumbers as recorded (" in result.output and "1 of 1 rows measured" in result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    (row,) = report["rows"]
    assert row["batch_size"] == 4 and row["launches"] > 100 and row["peak_bytes"] > row["weight_bytes"] > 2_000_000
    digits = find_row("edm/digits")
    assert row["hours"]["generate"] == pytest.approx(digits.num_synthetic / row["images_per_second"] / 3600)
    assert row["hours"]["evaluate"] == pytest.approx(4000 / row["images_per_second"] / 3600)  # no Inception is used
    trained = row["training"]["images_per_second"]
    assert row["hours"]["finetune"] == pytest.approx(digits.train.images / trained / 3600)
    assert report["facts"][0]["torch"] == torch.__version__ and report["ranks"] == {"ranks": 1}


def test_wrong_numbers_end_with_one_sentence_behind_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "differences", lambda device: {"metrics scores": 1e-7, "a gradient": float("inf")})
    monkeypatch.setattr(command, "measure", lambda row, *_: {"row": row.id, "skipped": "not here"})
    out = tmp_path / "check.json"
    result = CliRunner().invoke(neon, ["check", "digits", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 2 and "Error: a gradient: differs from the recorded numbers by inf" in result.output
    assert out.exists() and "numbers NOT as recorded" in result.output


@pytest.mark.parametrize(
    ("row", "effort", "reason"),
    [
        ("edm/digits", Effort(seconds=0.0), "over 0 s an image"),
        ("var/imagenet_512", command.CPU_EFFORT, "more weights than are tried here"),
    ],
)
def test_what_takes_long_on_a_cpu_is_left_out_and_says_so(row, effort, reason):
    chosen = find_row(row)
    parts = next(commands for commands in find_backbones() if chosen in commands.rows).machine_check
    measured = measure(chosen, parts, CPU, effort)
    assert measured["row"] == row and measured["skipped"].startswith(reason)
    assert reason in command._line(command.cells(measured))


def test_a_check_that_is_stopped_keeps_the_rows_that_it_measured(tmp_path, monkeypatch):
    def measured(row, *_):
        if row.id == "edm/digits_guided":
            raise KeyboardInterrupt
        return {"row": row.id, "skipped": "not today"}

    monkeypatch.setattr(command, "check_machine", lambda where: {"facts": [], "golden": {}})
    monkeypatch.setattr(command, "measure", measured)
    out = tmp_path / "check.json"
    CliRunner().invoke(neon, ["check", "edm/digits", "edm/digits_guided", "--device", "cpu", "--out", str(out)])
    assert [row["row"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] == ["edm/digits"]


def test_a_network_that_cannot_be_compiled_is_measured_without_and_says_why(monkeypatch):
    def refuse(backbone):
        raise UserError("--compile: this network cannot be compiled here (no compiler)")

    row = find_row("edm/digits")
    parts = replace(backbone_of(row).machine_check, compile=refuse)
    measured = measure(row, parts, CPU, Effort(4, compiled=True))
    assert measured["images_per_second"] > 0
    assert measured["compiled"]["error"] == "--compile: this network cannot be compiled here (no compiler)"
    assert "failed" in command.cells(measured)


def test_ranks_wait_for_no_rank_whose_compilation_fails(monkeypatch):
    """All ranks meet once, whether theirs failed or not."""
    met = []
    monkeypatch.setattr(speed, "gather_objects", lambda value: met.append(value) or [value, (None, 5.0)])
    monkeypatch.setattr(speed, "_sample", lambda *_: None)
    row = find_row("edm/digits")
    parts = backbone_of(row).machine_check
    for refused in (RuntimeError("no compiler\non this rank"), RuntimeError("\n"), None):

        def compile_or_not(backbone, refused=refused):
            if refused:
                raise refused

        found = speed._compiled(row, replace(parts, compile=compile_or_not), None, CPU, 4)
        assert ("error" in found) == bool(refused)
        assert found.get("images_per_second", 6) > 5
    assert [problem for problem, _ in met] == ["no compiler", "RuntimeError", None]
