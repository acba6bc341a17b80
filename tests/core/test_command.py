"""`neon`: every stage of every row by one command, the same as the scripts."""

import importlib

import pytest
from click.testing import CliRunner

from neon_run import __main__ as entry
from neon_run.backbones import find_rows
from neon_run.command import neon

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


def test_ctrl_c_while_pytorch_is_imported_ends_without_a_traceback(monkeypatch):
    def interrupted(name):
        assert name == "neon_run.command"
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
