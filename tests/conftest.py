"""Options and fixtures that all tests share.

Imports that take seconds stand in the fixtures: xdist's controller reads this file and runs no test.
"""

import os
import re
import signal
import textwrap
from pathlib import Path

import huggingface_hub.constants  # noqa: F401  reads HF_HUB_OFFLINE when imported, which some tests set
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN_DATA = Path(__file__).parent / "golden" / "data"


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="use the GPU, where a test can; without it none is seen")
    parser.addoption("--golden-root", default=str(GOLDEN_DATA), help="folder of <part>/cases.json with their arrays")


def pytest_configure(config):
    """Before torch is imported, and for the processes that tests start: their numbers are those of a CPU."""
    if not config.getoption("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Golden numbers were made on one thread, and the suite shares its cores with its own child processes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def offline(monkeypatch):
    """No download is tried; without a network the hub's client would retry for 20 seconds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it is imported


@pytest.fixture
def golden_data() -> Path:
    """Folder of the golden cases that ship with the tests."""
    return GOLDEN_DATA


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights that fit the Inception network, drawn so that its features tell images apart."""
    import torch

    from neon_files.checkpoint import write_checkpoint
    from neon_metrics.inception import InceptionV3

    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = InceptionV3()
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    write_checkpoint(path, net.state_dict())
    return path


@pytest.fixture(scope="session")
def reference_file(tmp_path_factory):
    """Statistics of the right size, of no images in particular."""
    import numpy as np

    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    features = np.random.default_rng(0).standard_normal((16, 2048))
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return path


def pytest_terminal_summary(terminalreporter):
    """Name every golden case with its outcome, part by part."""
    parts: dict[str, list[str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            match = re.search(r"test_golden\.py::test_(?:case|key_list)\[([^-]+)-(.+)\]", report.nodeid)
            if match and report.when == "call":
                parts.setdefault(match[1], []).append(match[2] if outcome == "passed" else f"FAILED {match[2]}")
    if parts:
        terminalreporter.section("golden cases")
    for part, names in sorted(parts.items()):
        failed = sum(name.startswith("FAILED") for name in names)
        text = f"{part}: {len(names) - failed} of {len(names)} agree: {', '.join(sorted(names))}"
        terminalreporter.write_line(textwrap.fill(text, 118, subsequent_indent="    ", break_on_hyphens=False))
