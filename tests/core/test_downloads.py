"""Downloads against a loopback server that behaves like the hub and like a plain file host, well and badly."""

import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from loopback_hub import COMMIT, Loopback

from neon_files import home as home_module
from neon_files import transfer
from neon_files.downloads import fetch, main
from neon_files.errors import UserError
from neon_files.home import home
from neon_files.lock import Timeout, locked
from neon_files.manifest import MANIFEST, NON_COMMERCIAL, find_file, read_manifest
from neon_files.published import find_all

ROOT = Path(__file__).resolve().parents[2]
A = np.random.default_rng(0).bytes(700_000)
B = np.random.default_rng(1).bytes(300_001)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF", 0.01)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Loopback(a__pth=A, b__npz=B) as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.url)
        yield loopback


@pytest.fixture(params=["hub", "plain"])
def place(request, server, tmp_path):
    """A folder with a manifest of two files from one kind of source."""
    return Place(tmp_path, server, request.param)


class Place:
    def __init__(self, root: Path, server: Loopback, kind: str = "plain", **changes):
        self.root, self.server, self.manifest = root / "root", server, root / "manifest.json"
        self.kind = kind
        self.root.mkdir()
        entries = [{"name": "a.pth", "folder": "checkpoints"}, {"name": "b.npz", "folder": "fid_stats"}]
        for entry in entries:
            content = server.files[entry["name"]]
            if kind == "hub":
                entry |= {"repo": "someone/Neon"}
            else:
                known = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entry |= {"url": f"{server.url}/files/{entry['name']}"} | known
        entries[0] |= changes
        names = [entry["name"] for entry in entries]
        rows = {"both": names, "one": names[:1]}
        self.manifest.write_text(json.dumps({"entries": entries, "rows": rows}))
        self.a, self.b = self.root / "checkpoints" / names[0], self.root / "fid_stats" / names[1]

    def arguments(self, *words: str) -> list[str]:
        return ["--manifest", str(self.manifest), "--root", str(self.root), *words]

    def run(self, *words: str):
        """(exit code, stdout, stderr) of the command in this process."""
        result = CliRunner().invoke(main, self.arguments(*words))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result.exit_code, result.stdout, result.stderr

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "neon_files.downloads", *self.arguments(*words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)

    def good(self) -> bool:
        return self.a.read_bytes() == A and self.b.read_bytes() == B


def leftovers(folder: Path) -> list[str]:
    """Names in a folder but for locks and notes of what was verified."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith((".lock", ".verified")))


def test_fetched_once_then_no_request_at_all(place, monkeypatch):
    code, out, err = place.run()
    assert code == 0 and place.good() and "fetching" in err and out.count("verified") == 2
    assert leftovers(place.a.parent) == ["a.pth"]
    asked = len(place.server.requests)
    assert place.run()[0] == 0 and place.run("a.pth")[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert place.run("both")[0] == 0
    assert len(place.server.requests) == asked


def test_words_choose_rows_and_files(place):
    assert place.run("ONE")[0] == 0 and place.a.exists() and not place.b.exists()
    code, _, err = place.run("nope")
    assert code == 2 and "nope: neither a row nor a file; rows: both, one" in err


def test_cut_connection_goes_on_where_it_broke(place):
    place.server.faults["a.pth"] = [("cut", 300_000), ("cut", 100_000)]
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A
    ranges = [headers.get("Range") for headers in place.server.gets()]
    assert ranges == [None, "bytes=300000-", "bytes=400000-"]
    assert all(headers["If-Range"] for headers in place.server.gets()[1:])


def test_connection_that_keeps_breaking_is_told_and_the_next_run_resumes(place):
    place.server.faults["a.pth"] = [("cut", 1000)] + [("cut", 0)] * 20
    code, _, err = place.run()
    assert code == 2 and "no lasting connection" in err and "1,000 bytes are kept" in err
    assert not place.a.exists() and place.b.read_bytes() == B
    place.server.faults["a.pth"] = []
    assert place.run()[0] == 0 and place.good()
    assert place.server.gets()[-1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("fault", [("status", 503), ("status", 429)])
def test_passing_trouble_of_the_server_is_sat_out(place, fault):
    place.server.faults["a.pth"] = [fault, fault]
    assert place.run()[0] == 0 and place.good()


def test_silent_server_is_given_up_and_asked_again(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    place.server.faults["a.pth"] = [("stall", 200_000)]
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A
    assert place.server.gets()[-1]["Range"] == "bytes=200000-"


def test_wrong_bytes_of_the_right_length_are_thrown_away(place):
    wrong = bytearray(A)
    wrong[350_000] ^= 1
    place.server.faults["a.pth"] = [("bytes", bytes(wrong))]
    code, out, err = place.run()
    assert code == 2 and "a.pth" in err and f"instead of {hashlib.sha256(A).hexdigest()}; " not in out
    assert "has the sha256" in err and "1 of 2 files are not here" in err
    assert leftovers(place.a.parent) == [] and place.b.read_bytes() == B
    assert place.run()[0] == 0 and place.good()


def test_wrong_length_is_told_before_the_bytes_come(place):
    place.server.faults["a.pth"] = [("bytes", A[:-1])] * 9
    code, _, err = place.run("a.pth")
    assert code == 2 and "has 699,999 bytes instead of 700,000" in err and not place.a.exists()


def test_missing_file_fails_but_the_others_come(place):
    del place.server.files["a.pth"]
    code, out, err = place.run()
    assert code == 2 and place.b.read_bytes() == B and "fid_stats/b.npz: verified" in out
    assert "1 of 2 files are not here" in err and "checkpoints/a.pth <-" in err


def test_range_that_is_ignored_starts_over(place):
    place.server.faults["a.pth"] = [("cut", 300_000), ("no range",)]
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A


def test_file_that_changed_meanwhile_is_not_spliced(place):
    place.server.faults["a.pth"] = [("cut", 300_000)] + [("cut", 0)] * 9
    assert place.run("a.pth")[0] == 2
    new = bytes(reversed(A))
    place.server.files["a.pth"] = new
    place.server.faults["a.pth"] = []
    code, _, err = place.run("a.pth")
    if place.kind == "hub":  # it says what the new hash is
        assert code == 0 and place.a.read_bytes() == new
    else:  # fetched anew, and then not what the manifest says
        assert code == 2 and f"has the sha256 {hashlib.sha256(new).hexdigest()} instead of" in err
        assert not place.a.exists()


def test_server_without_validators_starts_over(server, tmp_path):
    place = Place(tmp_path, server)
    server.etags = False
    server.faults["a.pth"] = [("cut", 300_000)]
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A
    assert [headers.get("Range") for headers in server.gets()] == [None, None]


def test_longer_part_than_the_file_starts_over(server, tmp_path):
    place = Place(tmp_path, server)
    server.faults["a.pth"] = [("cut", 300_000)] + [("cut", 0)] * 9
    assert place.run("a.pth")[0] == 2
    (part,) = place.a.parent.glob("*.part")
    part.write_bytes(A + b"more")
    server.faults["a.pth"] = []
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A


def test_two_processes_make_one_download(place):
    place.server.faults["a.pth"] = [("stall", 100_000)]
    first = place.start("a.pth", HF_HUB_DOWNLOAD_TIMEOUT="60")
    place.server.wait_for(lambda: len(place.server.gets()) == 1)
    second = place.start("a.pth", HF_HUB_DOWNLOAD_TIMEOUT="60")
    while "waiting" not in (line := second.stderr.readline()):
        assert line, "the second process did not wait"
    place.server.stalled.set()  # cuts the first one's connection, which then resumes
    for process in (first, second):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert place.a.read_bytes() == A and len(place.server.gets()) == 2


def test_killed_in_the_middle_then_resumed(place):
    place.server.faults["a.pth"] = [("stall", 300_000)]
    with place.start("a.pth", HF_HUB_DOWNLOAD_TIMEOUT="60") as process:
        part = place.a.with_name(".a.pth.fetched.part")
        place.server.wait_for(lambda: part.exists() and part.stat().st_size > 200_000, 120)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not place.a.exists()
    have = part.stat().st_size
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A
    assert place.server.gets()[-1]["Range"] == f"bytes={have}-"
    assert leftovers(place.a.parent) == ["a.pth"]


def test_offline_lists_all_that_is_missing_without_a_request(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = place.run()
    assert code == 2 and "2 of 2 files are not here" in err and "HF_HUB_OFFLINE" in err
    assert "checkpoints/a.pth <- " in err and "fid_stats/b.npz <- " in err and place.server.requests == []


def test_no_network_lists_all_that_is_missing(place, monkeypatch):
    place.server.__exit__()
    code, _, err = place.run()
    assert code == 2 and "2 of 2 files are not here" in err and err.count("no connection to") == 2


def test_file_put_there_by_hand_is_used_offline_and_checked_online(server, tmp_path, monkeypatch):
    place = Place(tmp_path, server, "hub")
    place.a.parent.mkdir()
    place.a.write_bytes(A)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = place.run("a.pth")
    assert code == 0 and "present, not verified (HF_HUB_OFFLINE is set)" in err and "unverified" in out
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert place.run("a.pth")[0] == 0 and server.gets() == []  # the hub's hash sufficed
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "a.pth: verified" in place.run("a.pth")[1]


def test_truncated_file_of_another_tool_is_replaced_and_kept(place):
    place.a.parent.mkdir()
    place.a.write_bytes(A[:500_000])
    code, _, err = place.run("a.pth")
    assert code == 0 and place.a.read_bytes() == A and "kept as a.pth.old" in err
    assert place.a.with_name("a.pth.old").read_bytes() == A[:500_000]


def test_damage_after_the_download_is_found_by_verify_and_mended(place):
    assert place.run()[0] == 0
    facts = place.a.stat()
    damaged = b"\0" + A[1:]
    place.a.write_bytes(damaged)
    os.utime(place.a, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # invisible to all but a hash
    asked = len(place.server.requests)
    code, out, err = place.run("--verify")
    assert code == 2 and "BAD  checkpoints/a.pth  has the sha256" in out and "ok   fid_stats/b.npz" in out
    assert "1 of these files are missing or damaged" in err and len(place.server.requests) == asked
    os.utime(place.a)
    assert place.run()[0] == 0 and place.good()
    assert place.run("--verify")[0] == 0


def test_touched_file_is_hashed_again_and_believed(place):
    assert place.run()[0] == 0
    asked = len(place.server.requests)
    os.utime(place.a)
    assert "checkpoints/a.pth: verified" in place.run()[1] and len(place.server.requests) == asked


def test_dry_run_and_list_make_no_request(place):
    code, out, _ = place.run("--dry_run")
    assert code == 0 and out.count("fetch ") == 2 and "(missing)" in out
    code, out, _ = place.run("--list")
    assert code == 0 and "checkpoints/a.pth" in out and "both, one" in out
    assert place.server.requests == [] and list(place.root.iterdir()) == []


def test_symlinked_folder_is_followed_and_a_broken_link_is_told(place, tmp_path):
    (tmp_path / "big disk").mkdir()
    (place.root / "checkpoints").symlink_to(tmp_path / "big disk")
    (place.root / "fid_stats").symlink_to(tmp_path / "not mounted")
    code, _, err = place.run()
    assert code == 2 and (tmp_path / "big disk" / "a.pth").read_bytes() == A
    assert "fid_stats: cannot write there (a broken link)" in err


def test_folder_that_cannot_be_written(place):
    (place.root / "checkpoints").write_text("a file where the folder should be")
    code, _, err = place.run("a.pth")
    assert code == 2 and "checkpoints: cannot write there" in err and place.server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(place):
    (place.root / "checkpoints").mkdir(mode=0o500)
    code, _, err = place.run("a.pth")
    assert code == 2 and "cannot write there" in err and place.server.requests == []


def test_full_disk_is_foreseen(place, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    code, _, err = place.run("a.pth")
    assert code == 2 and "needs 700,000 bytes" in err and "1,000 are free" in err


def test_write_that_fails_is_told_and_what_came_is_kept(place):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
    limited += "from neon_files.downloads import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", limited, *place.arguments("a.pth")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert not place.a.exists()
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A


def test_token_goes_to_the_hub_but_not_to_where_it_redirects(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Place(tmp_path, server, "hub").run("a.pth")[0] == 0
    hub = [headers for _, path, headers in server.requests if "/resolve/" in path]
    assert hub and all(headers["Authorization"] == "Bearer hf_secret" for headers in hub)
    assert server.gets("/cdn/") and not any("Authorization" in headers for headers in server.gets("/cdn/"))


@pytest.mark.parametrize(("status", "message"), [(401, "a.pth"), (500, "the hub answers")])
def test_hub_that_refuses_is_told(server, tmp_path, status, message):
    server.head_status = status
    code, _, err = Place(tmp_path, server, "hub").run("a.pth")
    assert code == 2 and message in err


def test_small_files_of_the_hub_are_checked_by_git_hash(server, tmp_path):
    server.lfs = False
    place = Place(tmp_path, server, "hub")
    server.faults["a.pth"] = [("bytes", bytes(len(A)))]
    code, _, err = place.run("a.pth")
    assert code == 2 and "git hash" in err and not place.a.exists()
    assert "a.pth: verified" in place.run("a.pth")[1]
    record = json.loads(place.a.with_name(".a.pth.verified").read_text())
    assert record["sha256"] == hashlib.sha256(A).hexdigest() and record["version"].startswith(COMMIT)


def test_doubtful_hash_yields_to_the_hub_and_a_certain_one_does_not(server, tmp_path):
    for confirmed in (False, True):
        folder = tmp_path / str(confirmed)
        folder.mkdir()
        place = Place(folder, server, "hub", sha256="0" * 64, size=12, confirmed=confirmed)
        code, _, err = place.run("a.pth")
        if confirmed:
            assert code == 2 and "the hub now has other bytes" in err and not place.a.exists()
        else:
            assert code == 0 and "the hub's counts" in err and place.a.read_bytes() == A
            assert "a.pth: verified" in place.run("a.pth")[1]


def test_licence_is_stated_when_a_restricted_file_is_fetched(place):
    content = json.loads(place.manifest.read_text())
    content["entries"][0]["licence"] = NON_COMMERCIAL
    place.manifest.write_text(json.dumps(content))
    _, _, err = place.run()
    assert err.count("non-commercial use only") == 1 and f"a.pth: {NON_COMMERCIAL}" in err
    assert "non-commercial" not in place.run()[2]


@pytest.fixture
def xet(server, tmp_path, monkeypatch):
    """The hub stores a.pth in Xet, with the real library's store of chunks in a folder."""
    hf_xet = pytest.importorskip("hf_xet", reason="a platform without the hub's Xet library")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet cache"))
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
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    xet.server.faults["a.pth"] = [("cut", 300_000)] + [("cut", 0)] * 9
    assert xet.run("a.pth")[0] == 2
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    part = xet.a.with_name(".a.pth.fetched.part")
    assert part.read_bytes() == A[:300_000]
    part.write_bytes(b"?" + A[1:300_000])  # would not be seen if it started over
    code, _, err = xet.run("a.pth")
    assert code == 2 and "has the sha256" in err and not xet.a.exists() and not part.exists()
    assert xet.run("a.pth")[0] == 0 and xet.a.read_bytes() == A


def test_store_of_chunks_that_fails_is_told_and_the_next_run_goes_on(xet, monkeypatch):
    good, xet.server.cas = xet.server.cas, "http://127.0.0.1:9"
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    code, _, err = xet.run("a.pth")
    assert code == 2 and "no lasting connection to" in err and "1 of 1 files are not here" in err
    xet.server.cas = good
    assert xet.run("a.pth")[0] == 0 and xet.a.read_bytes() == A


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
    server.files["a.pth"] = A
    code, _, err = place.run("a.pth")
    assert code == 0 and place.a.read_bytes() == A and f"{kind}" in err and "kept as a.pth.old" in err


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_empty_time_out_means_none_and_an_odd_one_is_named(server, tmp_path, monkeypatch, name):
    place = Place(tmp_path, server, "hub")
    monkeypatch.setenv(name, "soon")
    code, _, err = place.run("a.pth")
    assert code == 2 and f"{name}=soon: not a whole number of seconds; set another or unset it" in err
    monkeypatch.setenv(name, "")
    assert place.run("a.pth")[0] == 0 and transfer.timeout_seconds() == 30


def test_empty_time_outs_do_not_stop_a_fresh_process(server, tmp_path):
    place = Place(tmp_path, server, "hub")
    process = place.start("a.pth", HF_HUB_DOWNLOAD_TIMEOUT="", HF_HUB_ETAG_TIMEOUT=" ")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and place.a.read_bytes() == A, err


def break_flock(monkeypatch, code: str) -> None:
    def broken(descriptor, how):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", broken)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "ENOTSUP"])
def test_file_system_without_flock_has_a_softer_lock(server, tmp_path, monkeypatch, code):
    break_flock(monkeypatch, code)
    place = Place(tmp_path, server)
    assert place.run()[0] == 0 and place.good()
    with locked(tmp_path / "x.lock"), pytest.raises(Timeout), locked(tmp_path / "x.lock", timeout=0):
        pass
    with locked(tmp_path / "x.lock", timeout=0):
        pass


def test_softer_lock_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    break_flock(monkeypatch, "ENOLCK")
    code = "import sys, filelock; x = filelock.SoftFileLock(sys.argv[1]); x.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "x.lock.soft")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(Timeout), locked(tmp_path / "x.lock", timeout=0):
            pass
        holder.kill()
    with locked(tmp_path / "x.lock", timeout=30):
        assert (tmp_path / "x.lock.soft").exists()


def test_lock_that_fails_otherwise_is_one_sentence(server, tmp_path, monkeypatch):
    break_flock(monkeypatch, "EIO")
    code, _, err = Place(tmp_path, server).run("a.pth")
    assert code == 2 and "checkpoints: cannot write there (Input/output error)" in err and server.requests == []


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
    session = SimpleNamespace(stream=lambda *_, **__: contextlib.nullcontext(response))
    monkeypatch.setattr(transfer, "hub_client", lambda: SimpleNamespace(get_session=lambda: session))
    with pytest.raises(UserError, match="which is not encrypted; not fetched"):
        transfer.download(transfer.Source("https://example.org/a"), tmp_path / "a")


# For the scripts


def test_url_is_fetched_once_into_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    url = f"{server.url}/files/a.pth?download=1"
    server.files["a.pth?download=1"] = A
    path = fetch(url)
    assert path.read_bytes() == A and path.name.endswith("_a.pth") and path.is_relative_to(tmp_path / "cache")
    assert fetch(url) == path and len(server.gets()) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(url) == path
    with pytest.raises(UserError, match=r"missing; HF_HUB_OFFLINE is set; put the file at .*_c\.npz yourself"):
        fetch(f"{server.url}/c.npz")
    assert len(server.gets()) == 1


def test_published_url_is_found_where_the_script_puts_it(server, tmp_path, monkeypatch):
    entry = next(entry for entry in MANIFEST.entries if entry.name == "cifar10-32x32.npz")
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"run `bash download_models\.sh cifar10-32x32\.npz`"):
        fetch(entry.url)
    (tmp_path / "fid_stats").mkdir()
    (tmp_path / entry.destination).write_bytes(b"x")
    assert fetch(entry.url) == tmp_path / entry.destination


def test_path_is_only_looked_for(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"x")
    assert fetch(tmp_path / "x.npz") == tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"kl16\.ckpt: does not exist; `bash download_models\.sh kl16\.ckpt` puts"):
        fetch(tmp_path / "kl16.ckpt")
    with pytest.raises(UserError, match=r"`bash download_models\.sh xarl` puts Neon_xARL_imagenet256\.pth into .*/ch"):
        find_file("checkpoints/Neon_xARL_imagenet256.pth")


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A working directory and a root without any published file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEON_HOME", str(tmp_path / "root"))
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_all_files_that_a_command_lacks_are_named_in_one_line_with_one_command(empty_home):
    wanted = {
        "--var_ckpt": "checkpoints/Neon_VARd16_imagenet256.pth",
        "--vae_ckpt": Path("elsewhere/vae_ch160v4096z32.pth"),
        "--fid_stats": "fid_stats/adm_in256_stats.npz",
        "--detector": None,
    }
    with pytest.raises(UserError) as caught:
        find_all(wanted)
    assert caught.value.message == (
        "not here: --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth, --vae_ckpt elsewhere/vae_ch160v4096z32.pth, "
        "--fid_stats fid_stats/adm_in256_stats.npz; `bash download_models.sh vard16` fetches them"
    )
    (empty_home / "fid_stats").mkdir()
    (empty_home / "fid_stats" / "adm_in256_stats.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^not here: --vae_path kl16\.ckpt; `bash .*sh kl16\.ckpt` fetches it$"):
        find_all({"--fid_stats": wanted["--fid_stats"], "--vae_path": "kl16.ckpt"})
    assert find_all({"--fid_stats": wanted["--fid_stats"], "--detector": None}) == {
        "--fid_stats": Path("fid_stats/adm_in256_stats.npz")
    }


def test_files_that_nobody_publishes_and_folders_are_named_beside_the_command(empty_home):
    (empty_home / "folder").mkdir()
    wanted = {"--base": "mine.pth", "--fid_stats": "folder", "--reference": "fid_stats/cifar10-32x32.npz"}
    with pytest.raises(UserError) as caught:
        find_all(wanted | {"--heldout": "fid_stats/ffhq-64x64.npz"})
    assert caught.value.message == (
        "not here: --reference fid_stats/cifar10-32x32.npz, --heldout fid_stats/ffhq-64x64.npz; "
        "`bash download_models.sh cifar10-32x32.npz ffhq-64x64.npz` fetches them; "
        "--base mine.pth: does not exist; nobody publishes a file of this name (`bash download_models.sh --list`), "
        "so name another one; --fid_stats folder: is a folder; name a file in it"
    )


def test_urls_are_named_with_the_paths_or_fetched(server, empty_home, monkeypatch):
    urls = {e.name: e.url for e in MANIFEST.entries}
    base, reference = urls["edm-ffhq-64x64-uncond-vp.pkl"], urls["ffhq-64x64.npz"]
    with pytest.raises(UserError) as caught:
        find_all({"--network": base, "--syn": "Neon_EDM_FFHQ.pkl", "--ref": reference, "--other": server.url + "/x"})
    assert caught.value.message == (
        f"not here: --network {base} (not fetched yet), --syn Neon_EDM_FFHQ.pkl, --ref {reference} (not fetched yet); "
        "`bash download_models.sh edm-ffhq` fetches them"
    )
    with pytest.raises(UserError, match=r"\(not fetched yet\), --ref .* fetches them; --other .* yourself$"):
        find_all({"--other": server.url + "/x", "--network": base, "--ref": reference})
    assert server.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_all({"--other": f"{server.url}/files/a.pth"})["--other"].read_bytes() == A


# Where files go


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As from a wheel: the code lies in a folder without download_models.sh."""
    monkeypatch.setattr(home_module, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("NEON_HOME", raising=False)
    monkeypatch.delenv("NEON_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_a_checkout_stay_in_it_unless_neon_home_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("NEON_HOME", raising=False)
    assert home() == ROOT and home_module.download_command("xarl") == "bash download_models.sh xarl"
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    assert home() == tmp_path


def test_an_installed_package_keeps_files_in_the_users_cache(installed, monkeypatch):
    assert home() == installed / "cache" / "neon" and home_module.cache_dir() == home()
    with pytest.raises(UserError, match=r"`neon download xarl` puts Neon_xARL_.*pth into .*neon/checkpoints$"):
        find_file("checkpoints/Neon_xARL_imagenet256.pth")
    with pytest.raises(UserError, match=r"`neon download xarl` fetches it$"):
        find_all({"--base": "checkpoints/xAR-L.pth"})
    monkeypatch.setenv("NEON_HOME", "~/models")
    assert home() == Path.home() / "models"


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", None, ".cache/neon"),
        ("darwin", None, "Library/Caches/neon"),
        ("win32", None, "AppData/Local/neon"),
        ("win32", "LOCALAPPDATA", "neon"),
    ],
)
def test_cache_folder_of_the_platform(installed, monkeypatch, platform, variable, folder):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(installed))
    if variable:
        monkeypatch.setenv(variable, str(installed))
    assert home() == installed / folder


def test_the_place_of_a_published_file_is_also_sought_in_the_home(installed, capsys):
    there = home() / "fid_stats" / "adm_in256_stats.npz"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x")
    assert find_file("fid_stats/adm_in256_stats.npz") == there and find_file("ADM_in256_stats.npz") == there
    assert f"fid_stats/adm_in256_stats.npz: not there; using {there}" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):  # another folder means another file
        find_file("mine/adm_in256_stats.npz")
    here = installed / "fid_stats" / "adm_in256_stats.npz"
    here.parent.mkdir()
    here.write_bytes(b"y")
    assert find_file("fid_stats/adm_in256_stats.npz") == Path("fid_stats/adm_in256_stats.npz")


def test_a_cache_that_cannot_be_written_is_one_sentence(installed, server):
    (installed / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError) as caught:
        fetch(f"{server.url}/files/a.pth")
    sentence = f"{installed}/cache/neon/downloads: cannot write there (Not a directory); mend that, or set NEON_HOME to"
    assert caught.value.message.startswith(sentence) and server.requests == []


def test_download_command_of_an_installed_package_fills_the_home(tmp_path):
    shutil.copytree(ROOT / "neon_files", tmp_path / "site" / "neon_files", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "NEON_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "neon_files.downloads", "--list", "imm"]
    there = tmp_path / "home" / "checkpoints" / "cifar10.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x")
    result = subprocess.run(
        [*command, "cifar10.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "here       ? bytes  checkpoints/cifar10.pt" in result.stdout, result.stderr
    assert result.stdout.count("<- hub") == 6


# The list itself


def test_list_is_consistent():
    names = [entry.name for entry in MANIFEST.entries]
    assert len(set(names)) == len(names) and len(MANIFEST.default) == 10
    spelled = [name.lower() for e in MANIFEST.entries for name in (e.name, *e.aliases)]
    assert len(set(spelled)) == len(spelled)
    for entry in MANIFEST.entries:
        assert bool(entry.repo) != bool(entry.url) and entry.licence
        assert len(entry.sha256) in (0, 64) and not Path(entry.folder).is_absolute()
    for row in MANIFEST.rows:
        chosen = {entry.name for entry in MANIFEST.select((row,))}
        assert chosen == set(MANIFEST.rows[row]) and any(name.startswith("weights-inception") for name in chosen)
    in_rows = {name for names in MANIFEST.rows.values() for name in names}
    assert set(MANIFEST.default) <= in_rows
    assert all(e.restricted for e in MANIFEST.entries if "edm" in (e.name + e.url).lower() or "lumaai" in e.repo)
    assert MANIFEST.entry("checkpoints/Neon_IMM_imagenet256.pth").name == "Neon_imm_imagenet256.pkl"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"entries": [{"name": "a", "folder": "b"}]}', "a: either a repo or a url"),
        ('{"entries": [{"name": "a", "folder": "b", "url": "u", "colour": 1}]}', "colour"),
        ('{"entries": [], "rows": {"r": ["a"]}}', "a under rows or default, but not under entries"),
    ],
)
def test_a_list_of_ones_own_is_checked(tmp_path, content, reason):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(UserError, match=r"own\.json: not a list of published files") as caught:
        read_manifest(tmp_path / "own.json")
    assert reason in caught.value.message


@pytest.mark.parametrize("package", ["neon_var", "neon_xar", "neon_edm", "neon_imm"])
def test_every_recipe_names_files_that_can_be_fetched(package):
    recipes = importlib.import_module(f"{package}.recipes").RECIPES
    known = {entry.destination for entry in MANIFEST.entries} | {entry.url for entry in MANIFEST.entries}
    assert recipes
    for recipe in recipes.values():
        for place in (recipe.base, recipe.fid_stats):
            assert not place or place in known, f"{recipe.name}: {place}"


def test_shell_script_passes_on_words_and_exit_code(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "download_models.sh"), "--root", "here", "inception"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "1 of 1 files are not here" in result.stderr
    environment["PYTHON"] = "/nonexistent/python"
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "pip install -e ." in result.stderr


def test_the_list_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert "manifest.json" in data["neon_files"] and (ROOT / "neon_files" / "manifest.json").is_file()


def test_documentation_lists_every_file_and_row():
    text = (ROOT / "docs" / "downloads.md").read_text()
    assert all(f"`{name}`" in text for name in (*MANIFEST.rows, *(entry.name for entry in MANIFEST.entries)))
    assert all(f"`{entry.folder}/`" in text and entry.repo in text for entry in MANIFEST.entries)
