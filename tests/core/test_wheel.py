"""The wheel alone, in an environment of its own and a folder without a checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from launch import environment
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TREES = ("neon_files", "neon_core", "neon_metrics", "neon_run",
         "VAR/neon_var", "xAR/neon_xar", "edm/neon_edm", "imm/neon_imm")  # fmt: skip
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

# One process for all commands, since each would import torch anew: [arguments, ...] -> [[exit code, output], ...].
SESSION = """
import contextlib, io, json, sys
from neon_run.command import main
def run(words):
    sys.argv, text = ["neon", *words], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main()
        except SystemExit as end:
            return [end.code or 0, text.getvalue()]
print(json.dumps([[run(words) for words in json.loads(sys.argv[1])], sys.modules["neon_run.command"].__file__]))
"""


def build(folder: Path) -> Path:
    """The wheel of a copy of this tree, as a user's pip would build it."""
    tree = folder / "tree"
    for part in TREES:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [*PIP, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(tree)]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The scripts' folder of a fresh environment that shares this one's packages, but not its link to the checkout."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # a folder that a .pth names is searched, but .pth files in it are not read: that is where editable installs hook in
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [*PIP, "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True, timeout=120)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="bin/ and symbolic links")
def test_the_wheel_works_in_an_empty_folder_without_the_checkout(tmp_path):
    """Slow: it builds, installs, and starts Python twice with torch."""
    wheel = build(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    for tree in map(ROOT.joinpath, TREES):
        files = [path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(tree.parent).as_posix() for path in files} <= names, "every file, data included"
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]
    programs = install(wheel, tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"w": torch.tensor([1.0, 2.0])}, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([2.0, 2.0])}, tmp_path / "syn.safetensors")
    alone = environment(PYTHONPATH="", XDG_CACHE_HOME=tmp_path / "cache", NEON_HOME="", NEON_CACHE_DIR="")
    alone |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}

    version = subprocess.run([programs / "neon", "--version"], cwd=empty, env=alone, capture_output=True, text=True)
    assert version.stdout == f"neon, version {wheel.name.split('-')[1]}\n", version.stderr

    commands = {
        "rows": ["rows"],
        "fid": ["fid", "var/imagenet_256", "--var_ckpt", "x", "--device", "cpu"],
        "generate": ["generate", "edm/cifar10_cond", "--help"],
        "finetune": ["finetune", "xar/xar_base", "--data", "nowhere", "--outdir", "out", "--device", "cpu"],
        "sweep": ["sweep", "imm/imagenet_256", "--help"],
        "no row": ["sweep", "--help"],
        "merge": ["merge", "../base.safetensors", "../syn.safetensors", "-w", "0.5", "-o", "neon.safetensors"],
        "merge nothing": ["merge"],
        "status": ["status", "nowhere"],
        "reproduce": ["reproduce", "no-such-row", "--out", "run"],
        "download": ["download", "--list"],
        "download offline": ["download", "--root", "here", "inception"],
    }
    words = json.dumps(list(commands.values()))
    done = subprocess.run([programs / "python", "-c", SESSION, words], cwd=empty, env=alone, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, where = json.loads(done.stdout)
    assert Path(where).is_relative_to(tmp_path / "environment"), "the wheel's code, not the checkout's"
    code, text = {}, {}
    for name, (code[name], text[name]) in zip(commands, results, strict=True):
        assert "Traceback" not in text[name], text[name]
    assert code["rows"] == 0 and all(row in text["rows"] for row in ("edm/digits", "imm/imagenet_256", "xar/xar_base"))
    assert code["fid"] == 2 and "--var_ckpt x: does not exist" in text["fid"]
    assert "`neon download vard16` fetches them" in text["fid"], "a command that exists here"
    assert code["finetune"] == 2 and "`neon download xarb` fetches them" in text["finetune"]
    assert code["generate"] == 0 and "Usage: neon generate edm/cifar10_cond [OPTIONS]" in text["generate"]
    assert code["sweep"] == 0 and "Usage: neon sweep imm/imagenet_256 [OPTIONS]" in text["sweep"]
    assert code["no row"] == 0 and "Usage: neon sweep [OPTIONS] ROW" in text["no row"]
    assert code["merge"] == 0, text["merge"]
    assert load_file(empty / "neon.safetensors")["w"].tolist() == [0.5, 2.0]
    assert code["merge nothing"] == 2 and code["status"] == 2 and code["reproduce"] == 2
    assert "no run.json there" in text["status"] and "no such row" in text["reproduce"]
    assert code["download"] == 0 and f"below {tmp_path / 'cache' / 'neon'}" in text["download"]
    assert code["download offline"] == 2 and "are not here" in text["download offline"]
    assert {path.name for path in empty.iterdir()} <= {"neon.safetensors", "neon.safetensors.json", "here", "out"}
