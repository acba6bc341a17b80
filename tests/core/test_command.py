"""`neon`: every stage of every row by one command, the same as the scripts."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from neon_run import start
from neon_run.backbones import find_rows
from neon_run.command import neon

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("VAR", "VAR/VAR_imagenet_256", "VAR/VAR_imagenet_512", "xAR", "edm", "imm")
STARTS = [ROOT / "neon_run/__main__.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")))]
ROWS = [row.id for row in find_rows().values() if row.prepare is None]


def run(*words):
    return CliRunner().invoke(neon, list(words))


@pytest.mark.parametrize("row", ["var/imagenet_512", "xar/xar_base", "edm/ffhq64", "imm/imagenet_256"])
@pytest.mark.parametrize("name", ["generate", "finetune", "sweep", "fid"])
def test_a_stage_of_a_row_has_the_flags_of_its_script(name, row):
    result = run(name, row, "--help")
    assert result.exit_code == 0 and f"[default: {row}]" in " ".join(result.output.split())


def test_the_row_chooses_backbone_and_settings(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    result = run("fid", "vard36", "--var_ckpt", "x.pth")
    assert result.exit_code == 2 and "adm_in512_stats.npz" in result.output and "--vae_ckpt" in result.output
    result = run("fid", "imm/imagenet_256", "fid_stats=x.npz", "eval.resume=gone.pkl", "--device", "cpu")
    assert result.exit_code == 2 and "gone.pkl" in result.output and "x.npz" in result.output, "official words too"


def test_an_unknown_or_ambiguous_row_is_refused_with_the_nearest():
    result = run("generate", "imagenet_256", "--outdir", "S")
    assert result.exit_code == 2 and "choose imm/imagenet_256 or var/imagenet_256" in result.output
    assert run("generate").exit_code == 2


def test_every_row_is_listed():
    result = run("rows")
    assert result.exit_code == 0 and all(row in result.output for row in ROWS)
    assert run("--version").output.startswith("neon, version ")


def interrupted(*args):
    signal.raise_signal(signal.SIGINT)
    pytest.fail("still importing")


@pytest.mark.parametrize("script", STARTS, ids=lambda script: script.relative_to(ROOT).as_posix())
def test_ctrl_c_while_pytorch_is_imported_ends_without_a_traceback(script, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib, "import_module", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_a_shell_has_its_jobs_ignore_ctrl_c_imports_ignore_it_too(monkeypatch):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(importlib, "import_module", lambda name: signal.raise_signal(signal.SIGINT) or name)
        assert start.imported("torch") == "torch"
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_script_that_is_interrupted_while_it_imports_prints_nothing(tmp_path):
    interrupting = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    (tmp_path / "torch.py").write_text(interrupting, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "imm/generate.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
