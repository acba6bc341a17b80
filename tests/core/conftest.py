"""What the tests of downloads share."""

import pytest
from download_place import A, B, Place
from loopback_hub import Loopback

from neon_files import receive


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(receive, "BACKOFF", 0.01)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as it was when it was imported
    with Loopback(a__pth=A, b__npz=B) as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.url)
        yield loopback


@pytest.fixture(params=["hub", "plain"])
def place(request, server, tmp_path):
    """A folder with a manifest of two files from one kind of source."""
    return Place(tmp_path, server, request.param)
