"""Options and fixtures that all tests share."""

from pathlib import Path

import pytest
import torch

GOLDEN_DATA = Path(__file__).parent / "golden" / "data"


def pytest_addoption(parser):
    parser.addoption("--golden-root", default=str(GOLDEN_DATA), help="folder of <part>/cases.json with their arrays")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Golden numbers were made on one thread, and the suite shares its cores with its own child processes."""
    torch.set_num_threads(1)


@pytest.fixture
def golden_data() -> Path:
    """Folder of the golden cases that ship with the tests."""
    return GOLDEN_DATA
