"""Downloads against a loopback server that behaves like the hub and like a plain file host, well and badly."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from download_place import ROOT, A, B, Place, leftovers
from loopback_hub import COMMIT

from neon_files import receive
from neon_files.manifest import NON_COMMERCIAL


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


def test_trouble_of_the_server_that_lasts_is_told(place):
    place.server.faults["a.pth"] = [("status", 503)] * 9
    code, _, err = place.run("a.pth")
    assert code == 2 and "no lasting connection to" in err and "503" in err and len(place.server.gets()) == 5


def test_silent_server_is_given_up_and_asked_again(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)  # its variable is read at the import
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
        part = place.a.with_name(".a.pth.part")
        place.server.wait_for(lambda: part.exists() and part.stat().st_size > 200_000, 120)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not place.a.exists()
    have = part.stat().st_size
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A
    assert place.server.gets()[-1]["Range"] == f"bytes={have}-"
    assert leftovers(place.a.parent) == ["a.pth"]


def killed(*_):
    raise KeyboardInterrupt


def test_stopped_while_it_is_hashed_then_not_fetched_again(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(receive, "compare", killed)
        assert place.run("a.pth")[0] == 130 and not place.a.exists()
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A and len(place.server.gets()) == 1


def test_stopped_before_the_first_byte_of_another_version_nothing_is_spliced(server, tmp_path, monkeypatch):
    place = Place(tmp_path, server, sha256="")  # no hash would tell a mixture
    server.faults["a.pth"] = [("cut", 300_000)] + [("cut", 0)] * 9
    assert place.run("a.pth")[0] == 2
    server.files["a.pth"], server.faults["a.pth"] = bytes(reversed(A)), []
    with monkeypatch.context() as patch:
        patch.setattr(receive, "_copy", killed)
        assert place.run("a.pth")[0] == 130
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == bytes(reversed(A))


def test_stopped_by_ctrl_c_then_resumed(server, tmp_path):
    place = Place(tmp_path, server)
    server.faults["a.pth"] = [("stall", 300_000)]
    with place.start("a.pth", HF_HUB_DOWNLOAD_TIMEOUT="60") as process:
        part = place.a.with_name(".a.pth.part")
        server.wait_for(lambda: part.exists() and part.stat().st_size > 200_000, 120)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and "received bytes are kept, and the same command continues" in err
    assert "Traceback" not in err
    assert place.run("a.pth")[0] == 0 and place.a.read_bytes() == A and server.gets()[-1]["Range"]


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
    (place.root / "checkpoints").write_text("a file where the folder should be", encoding="utf-8")
    code, _, err = place.run("a.pth")
    assert code == 2 and "checkpoints: cannot write there" in err and place.server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(place):
    (place.root / "checkpoints").mkdir(mode=0o500)
    code, _, err = place.run("a.pth")
    assert code == 2 and "cannot write there" in err and place.server.requests == []


def test_full_disk_is_foreseen(place, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(receive.shutil, "disk_usage", lambda path: usage)
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
    record = json.loads(place.a.with_name(".a.pth.verified").read_text(encoding="utf-8"))
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
    content = json.loads(place.manifest.read_text(encoding="utf-8"))
    content["entries"][0]["licence"] = NON_COMMERCIAL
    place.manifest.write_text(json.dumps(content), encoding="utf-8")
    _, _, err = place.run()
    assert err.count("non-commercial use only") == 1 and f"a.pth: {NON_COMMERCIAL}" in err
    assert "non-commercial" not in place.run()[2]
