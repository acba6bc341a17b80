"""environment.yml, pyproject.toml and what is installed agree."""

import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pyproject import PYPROJECT

ROOT = Path(__file__).resolve().parents[2]
PROJECT = PYPROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
CONDA = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
(PIP,) = [line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict)]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [*map(Requirement, lines)] for name, lines in PROJECT["optional-dependencies"].items()}
MODULES = {"pillow": "PIL"}  # where the import has another name than the package


def test_environment_ends_with_the_project_itself():
    assert PIP[-1] == "-e ." and not any("git+" in line or "://" in line for line in PIP)


def test_python_of_the_environment_is_one_that_the_project_allows():
    (python,) = [line for line in CONDA if line.startswith("python")]
    assert re.search(r"[\d.]+", python)[0] in SpecifierSet(PROJECT["requires-python"])


def test_versions_agree_with_the_project():
    stated = {requirement.name: requirement.specifier for requirement in NEEDED}
    for requirement in map(Requirement, PIP[:-1]):
        assert stated[requirement.name] == requirement.specifier, f"{requirement}: pyproject.toml says otherwise"


@pytest.mark.parametrize("requirement", [*NEEDED, *map(Requirement, PIP[:-1])], ids=str)
def test_every_package_is_importable_in_an_allowed_version(requirement):
    importlib.import_module(MODULES.get(requirement.name, requirement.name))
    assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_the_oldest_versions_in_ci_are_those_that_the_project_promises():
    lines = (ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, filter(_stated, lines))}
    extras = [r for name, extra in EXTRAS.items() if name not in ("dev", "docs") for r in extra]
    promised = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in [*NEEDED, *extras]}
    assert pinned.keys() == promised.keys()
    for name, version in pinned.items():
        assert Version(version) == Version(promised[name]), name


def _stated(line: str) -> bool:
    return bool(line) and not line.startswith("#")


def test_release_files_are_well_formed_and_name_one_version():
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version and citation["preferred-citation"]["url"].endswith("2510.03597")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[.*{re.escape(version.split('.dev')[0])}", changes, re.M), "no entry for this version"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert {"lint", "test", "wheel", "docs", "notebook", "supply"} <= workflow["jobs"].keys()
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8")), form
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format"]


def test_what_one_command_alone_needs_is_an_extra():
    extras = {name: [requirement.name for requirement in extra] for name, extra in EXTRAS.items()}
    assert "timm" in extras["detectors"] and "torchvision" in extras["data"]
    assert not {"timm", "torchvision"} & {requirement.name for requirement in NEEDED}


def test_every_page_stands_in_the_index():
    """`mkdocs build --strict` in CI checks the links; here, without it, that no page is forgotten."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    sections = [[entry] if isinstance(entry, str) else next(iter(entry.values())) for entry in site["nav"]]
    listed = [page for section in sections for page in section]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page for page in listed[1:] if f"({page})" not in index] == []
