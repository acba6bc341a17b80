"""The architecture: data flows one way, and the core knows no backbone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "neon_core": ROOT / "neon_core",
    "neon_var": ROOT / "VAR/neon_var",
    "neon_xar": ROOT / "xAR/neon_xar",
    "neon_edm": ROOT / "edm/neon_edm",
    "neon_imm": ROOT / "imm/neon_imm",
}
TOP_LEVEL = {
    "VAR",
    "xAR",
    "edm",
    "imm",
    "neon_core",
    "toy_appendix.ipynb",
    "download_models.sh",
    "environment.yml",
    "checkpoints",
    "fid_stats",
    "README.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "tests",
    "docs",
    "benchmarks",
    ".ci",
    ".gitignore",
}


def imports(file: Path) -> set[str]:
    """First parts of every module a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_the_core_and_never_each_other(package):
    others = set(PACKAGES) - {package, "neon_core"}
    for file in PACKAGES[package].rglob("*.py"):
        assert not imports(file) & others, f"{file} imports {imports(file) & others}"


def test_the_core_names_no_backbone():
    for file in (ROOT / "neon_core").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not words & {"var", "VAR", "xar", "xAR", "edm", "EDM", "imm", "IMM"}, f"{file}:{node.lineno}"


def test_backbones_have_the_same_files():
    for package in set(PACKAGES) - {"neon_core"}:
        names = {file.name for file in PACKAGES[package].glob("*.py")}
        assert {"__init__.py", "backbone.py", "recipes.py", "rows.py", "sampler.py", "loss.py"} <= names, package
    for folder in ("VAR", "xAR", "edm", "imm"):
        assert {"generate.py", "finetune.py", "sweep.py"} <= {p.name for p in (ROOT / folder).glob("*.py")}
        assert list((ROOT / folder).rglob("calculate_fid.py"))


def test_nothing_else_lies_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL


def test_pyproject_lists_every_package():
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for name, folder in PACKAGES.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert listed == found


def test_importing_starts_nothing():
    code = (
        "import torch, neon_core, neon_var.backbone, neon_xar.backbone, neon_edm.backbone, neon_imm.backbone\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert 'matplotlib' not in __import__('sys').modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=_path())
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": ":".join(str(ROOT / folder) for folder in (".", "VAR", "xAR", "edm", "imm"))}
