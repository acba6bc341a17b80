"""environment.yml, pyproject.toml and what is installed agree."""

import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has the first TOML reader")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
(PIP,) = [line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict)]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
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
