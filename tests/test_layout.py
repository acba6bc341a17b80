"""The architecture: data flows one way, and the core knows no backbone."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pyproject import PYPROJECT

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("neon_files", "neon_core", "neon_metrics", "neon_run")  # imports go down only, in this order
BACKBONES = {"neon_var": "VAR", "neon_xar": "xAR", "neon_edm": "edm", "neon_imm": "imm"}
PACKAGES = {name: ROOT / name for name in FLOORS} | {name: ROOT / top / name for name, top in BACKBONES.items()}
TOP_LEVEL = {
    "VAR",
    "xAR",
    "edm",
    "imm",
    *FLOORS,
    "toy_appendix.ipynb",
    "download_models.sh",
    "environment.yml",
    "mkdocs.yml",
    "checkpoints",
    "fid_stats",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "tests",
    "docs",
    "benchmarks",
    ".ci",
    ".gitignore",
    ".github",
    ".pre-commit-config.yaml",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of every package."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = file
    return found


MODULES = modules()


@cache
def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it; packages' `__init__` where only a name of theirs is used."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return found & MODULES.keys()


def package(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_go_down_only(name):
    """A floor imports the floors below it; a backbone imports the floors, never another backbone."""
    below = set(FLOORS) if name in BACKBONES else set(FLOORS[: FLOORS.index(name)])
    for module in (m for m in MODULES if package(m) == name):
        wrong = {used for used in imports(MODULES[module]) if package(used) not in below | {name}}
        assert not wrong, f"{module} imports {wrong}"


def test_no_circle_of_files():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for used in imports(MODULES[module]):
                visit(used, (*trail, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_imports_stand_at_the_top_of_a_file():
    """None hides in a function to break a circle. What may be missing (an optional package) is of others, not ours."""
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not [n for n in names if package(n) in PACKAGES], f"{module}:{node.lineno} imports in a function"


@pytest.mark.parametrize("top", [*FLOORS, *BACKBONES.values(), "benchmarks", "tests"])
def test_text_files_are_opened_with_an_encoding(top):
    """Without one the locale decides: a name or a "±" then ends the run on another machine."""
    for file in (ROOT / top).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _opens_text(node):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}: no encoding"


def _opens_text(call: ast.Call) -> bool:
    """`open(...)` in a mode without b, `path.read_text(...)` or `path.write_text(...)`; not `PIL.Image.open`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    if not (isinstance(call.func, ast.Name) and call.func.id == "open"):
        return False
    modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    literals = [node.value for mode in modes for node in ast.walk(mode) if isinstance(node, ast.Constant)]
    return not any(isinstance(value, str) and "b" in value for value in literals)


def test_the_core_is_small():
    files = [file for file in (ROOT / "neon_core").rglob("*.py") if file.name != "kl_vae.py"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 2000


BACKBONE_NAMES = re.compile(r"(?<![A-Za-z])(VAR|xAR|xar|EDM|edm|IMM|imm|neon_(var|xar|edm|imm))(?![A-Za-z])")
FILE_FACTS = {"var_wo_ddp"}  # entries of published files, whatever they are called


def test_no_backbone_is_named_below_the_backbones():
    """In strings, defaults and identifiers; docstrings and comments may say where a rule comes from."""
    for module in (m for m in MODULES if package(m) in FLOORS):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        homes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef))
        docstrings = {id(n.body[0].value) for n in homes if n.body and isinstance(n.body[0], ast.Expr)}
        for node in ast.walk(tree):
            texts = [getattr(node, name, None) for name in ("id", "name", "attr", "arg")]
            if isinstance(node, ast.Constant) and id(node) not in docstrings and node.value not in FILE_FACTS:
                texts.append(node.value)
            for text in texts:
                found = isinstance(text, str) and BACKBONE_NAMES.search(text.replace("_", " "))
                assert not found, f"{module}:{getattr(node, 'lineno', '')} names {text!r}"


def test_functions_take_at_most_eight_parameters():
    """Outside declared records: constructors and loaders (what files and rows say of a network), sampler settings, and
    `improve`, whose keywords are its settings."""
    records = {"__init__", "load", "sample", "edm_sampler", "sample_scales", "improve"}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in records:
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                assert count <= 8, f"{module}:{node.lineno} {node.name} takes {count} parameters"


def test_scripts_are_thin():
    scripts = [p for top in BACKBONES.values() for p in (*(ROOT / top).glob("*.py"), *(ROOT / top).glob("*/calc*.py"))]
    thin = [p for p in scripts if p.name in ("generate.py", "finetune.py", "sweep.py", "calculate_fid.py")]
    assert len(thin) == 17
    for path in thin:
        code = ast.parse(path.read_text(encoding="utf-8"))
        lines = path.read_text(encoding="utf-8").splitlines()
        docstring = code.body[0].end_lineno
        assert len(lines) - docstring <= 13, f"{path}: a script is its docstring, the path line and one call"
        assert imports(path) == {"neon_run.start"}, f"{path}: all else is imported there"


def test_downloading_and_starting_need_no_torch():
    code = "import sys, neon_files.downloads, neon_run.start; assert not {'torch', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_backbones_have_the_same_files():
    for package in BACKBONES:
        names = {file.name for file in PACKAGES[package].glob("*.py")}
        assert {"__init__.py", "backbone.py", "rows.py", "commands.py", "sampler.py", "loss.py"} <= names, package
    for folder in ("VAR", "xAR", "edm", "imm"):
        assert {"generate.py", "finetune.py", "sweep.py"} <= {p.name for p in (ROOT / folder).glob("*.py")}
        assert list((ROOT / folder).rglob("calculate_fid.py"))


def test_nothing_else_lies_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL


def test_pyproject_lists_every_package():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for name, folder in PACKAGES.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert listed == found


def test_importing_starts_nothing():
    code = (
        "import torch, neon_run.command, neon_var.backbone, neon_xar.backbone, neon_edm.backbone, neon_imm.backbone\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert 'matplotlib' not in __import__('sys').modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=_path())
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": ":".join(str(ROOT / folder) for folder in (".", "VAR", "xAR", "edm", "imm"))}
