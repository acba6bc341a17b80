"""Downloads: files in Xet, pages in place of files, odd settings, names and addresses."""

import _thread
import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from download_place import ROOT, A, B, Place, leftovers
from huggingface_hub.utils._xet import XET_CONNECTION_INFO_CACHE, XetSessionHolder
from loopback_hub import COMMIT

from neon_files import receive
from neon_files.downloads import fetch
from neon_files.errors import UserError


@pytest.fixture
def xet(server, tmp_path, monkeypatch):
    """The hub stores a.pth in Xet, with the real library's store of chunks in a folder."""
    hf_xet = pytest.importorskip("hf_xet", reason="a platform without the hub's Xet library")
    for name, value in {"CLIENT_RETRY_MAX_ATTEMPTS": "1", "CLIENT_RETRY_BASE_DELAY": "10ms"}.items():
        monkeypatch.setenv(f"HF_XET_{name}", value)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.utils._xet._GLOBAL_XET_HOLDER", XetSessionHolder())  # read the variables anew
    server.cas = f"local://{tmp_path / 'chunks'}"
    with hf_xet.XetSession().new_upload_commit(endpoint=server.cas) as commit:
        upload = commit.start_upload_bytes(A, name="a.pth")
    server.xet["a.pth"] = upload.result().xet_info.hash
    return Place(tmp_path, server, "hub")


def test_file_in_xet_comes_from_there_and_is_checked(xet):
    code, out, err = xet.run()
    assert code == 0 and xet.good() and out.count("verified") == 2, err
    assert len(xet.server.gets("/cdn/")) == 1 and len(xet.server.gets("/xet-token")) == 1  # b.npz is not in Xet
    assert leftovers(xet.a.parent) == ["a.pth"]


def test_file_in_xet_goes_on_where_http_broke_off(xet, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its variable is read at the import
    xet.server.faults["a.pth"] = [("cut", 300_000)] + [("cut", 0)] * 9
    assert xet.run("a.pth")[0] == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    xet.server.faults["a.pth"] = []
    part = xet.a.with_name(".a.pth.part")
    assert part.read_bytes() == A[:300_000]
    part.write_bytes(b"?" + A[1:300_000])  # would not be seen if it started over
    code, _, err = xet.run("a.pth")
    assert code == 2 and "has the sha256" in err and not xet.a.exists() and not part.exists()
    assert xet.run("a.pth")[0] == 0 and xet.a.read_bytes() == A


@pytest.mark.parametrize("error", [RuntimeError("Task error"), KeyboardInterrupt()])
def test_file_in_xet_that_breaks_off_goes_on_over_http(xet, monkeypatch, error):
    def broken(incomplete_path, **_):
        incomplete_path.write_bytes(A[:300_000])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.xet_get", broken)
        code, _, _ = xet.run("a.pth")
    if isinstance(error, KeyboardInterrupt):
        assert code == 130 and not xet.a.exists() and xet.server.gets() == []
        code, _, _ = xet.run("a.pth")
    assert code == 0 and xet.a.read_bytes() == A
    assert [headers.get("Range") for headers in xet.server.gets()] == ["bytes=300000-"]
    assert COMMIT in next(path for method, path, _ in xet.server.requests if method == "GET")  # no later version


def test_store_of_chunks_that_fails_is_told_and_the_next_run_goes_on(xet):
    good, xet.server.cas = xet.server.cas, "http://127.0.0.1:9"
    code, _, err = xet.run("a.pth")
    assert code == 2 and "no lasting connection to" in err and "1 of 1 files are not here" in err
    xet.server.cas = good
    XET_CONNECTION_INFO_CACHE.clear()
    assert xet.run("a.pth")[0] == 0 and xet.a.read_bytes() == A


def test_store_of_chunks_that_falls_silent_is_given_up(xet, monkeypatch):
    xet.server.cas = xet.server.url
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "200ms")
    code, _, err = xet.run("a.pth")
    assert code == 2 and "no lasting connection to" in err and "error sending request" in err


def test_ctrl_c_is_heard_while_the_store_of_chunks_is_silent(xet):
    xet.server.cas = xet.server.url

    def interrupt():
        xet.server.wait_for(lambda: xet.server.gets("/reconstructions/"))
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, err = xet.run("a.pth")
    thread.join()
    assert code == 130 and "the same command continues" in err


# What is no download: pages in its place, odd settings, file systems without locks


PAGE = b"\n<!DOCTYPE html><html><body>Sign in to continue</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n"


@pytest.mark.parametrize(("content", "kind"), [(PAGE, "is a web page"), (POINTER, "is a Git LFS pointer")])
def test_page_or_pointer_in_place_of_a_file_is_refused_not_recorded(server, tmp_path, monkeypatch, content, kind):
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    place = Place(tmp_path, server, sha256="", size=None)  # as NVIDIA's files: nothing to compare with
    server.files["a.pth"] = content
    code, _, err = place.run("a.pth")
    assert code == 2 and kind in err and "thrown away" in err and leftovers(place.a.parent) == []
    with pytest.raises(UserError, match=kind):
        fetch(f"{server.url}/files/a.pth")
    place.a.write_bytes(content)  # as another tool leaves it
    code, out, _ = place.run("--verify", "a.pth")
    assert code == 2 and f"BAD  checkpoints/a.pth  {kind}" in out
    assert not list(place.a.parent.glob("*.verified"))
    facts = place.a.stat()
    note = {"sha256": "", "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "checked": ""}
    place.a.with_name(".a.pth.verified").write_text(json.dumps(note), encoding="utf-8")  # as it was once believed
    server.files["a.pth"] = A
    code, _, err = place.run("a.pth")
    assert code == 0 and place.a.read_bytes() == A and f"{kind}" in err and "kept as a.pth.old" in err


def test_folder_in_place_of_the_file_and_a_file_that_cannot_be_read(server, tmp_path, monkeypatch):
    place = Place(tmp_path, server)
    place.a.mkdir(parents=True)
    code, _, err = place.run("a.pth")
    assert code == 2 and "a.pth: is a folder, where a file of this name belongs; move it away" in err
    place.b.parent.mkdir()
    place.b.write_bytes(B)
    real = open

    def denied(path, *arguments, **others):
        if Path(path) == place.b:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **others)

    monkeypatch.setattr("builtins.open", denied)
    code, _, err = place.run("b.npz")
    assert code == 2 and "b.npz: cannot be read (Permission denied); mend that or move it away" in err


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_empty_time_out_means_none_and_an_odd_one_is_named(server, tmp_path, monkeypatch, name):
    place = Place(tmp_path, server, "hub")
    monkeypatch.setenv(name, "soon")
    code, _, err = place.run("a.pth")
    assert code == 2 and f"{name}=soon: not a whole number of seconds; set another or unset it" in err
    monkeypatch.setenv(name, "")
    assert place.run("a.pth")[0] == 0 and "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ


def test_a_fresh_process_needs_no_torch_and_survives_empty_time_outs(server, tmp_path):
    place = Place(tmp_path, server, "hub")
    code = "import sys; from neon_files.downloads import main; main(sys.argv[1:], standalone_mode=False)\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    environment = os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "", "HF_HUB_ETAG_TIMEOUT": " "}
    command = [sys.executable, "-c", code, *place.arguments("a.pth")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and place.a.read_bytes() == A, result.stderr


def test_names_of_240_letters_and_long_urls(server, tmp_path, monkeypatch):
    name = "n" * 236 + ".pth"
    server.files[name] = A
    place = Place(tmp_path, server, name=name, url=f"{server.url}/files/{name}")
    assert place.run(name)[0] == 0 and place.a.read_bytes() == A
    asked = len(server.requests)
    assert f"{name}: verified" in place.run(name)[1] and len(server.requests) == asked
    place.a.write_bytes(A[:9])
    assert place.run(name)[0] == 0 and place.a.read_bytes() == A
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    server.files |= {f"{name}?{'q' * 3000}": A}
    path = fetch(f"{server.url}/files/{name}?{'q' * 3000}")
    assert path.read_bytes() == A and path.suffix == ".pth" and len(path.name) < 100
    with pytest.raises(UserError, match=r"cannot be looked for .File name too long.; name another file"):
        fetch("x" * 300)


def test_address_that_leads_from_https_to_http_is_refused(monkeypatch, tmp_path):
    response = SimpleNamespace(status_code=200, url=SimpleNamespace(scheme="http"), headers={}, iter_raw=list)
    monkeypatch.setattr("huggingface_hub.utils.http_stream_backoff", lambda *_, **__: contextlib.nullcontext(response))
    with pytest.raises(UserError, match="which is not encrypted; not fetched"):
        receive.download(receive.Source("https://example.org/a"), tmp_path / "a", "a")
