"""What a run reads of its own: damage is seen and named, and one run at a time is in a folder."""

import errno
import fcntl
import os
import pickle
import signal
import socket
from pathlib import Path

import pytest
import torch

from neon_files.atomic import write_json
from neon_files.errors import UserError
from neon_files.run_files import (
    NUMBER,
    DamagedFile,
    identity,
    intact,
    one_run,
    read_record,
    read_tensors,
    unchanged,
    write_record,
)
from neon_files.stopping import Stopped

VALUE = {"seconds": 1.5, "key": "a", "points": [0.1, float("inf")], "nested": {"b": None}}
TYPES = {"seconds": NUMBER, "key": str}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


def test_a_record_comes_back_and_any_changed_digit_is_seen(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, VALUE)
    assert read_record(path, TYPES) == VALUE
    path.write_text(path.read_text(encoding="utf-8").replace("1.5", "1.25"), encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"a\.json: damaged \(its digest does not fit\)"):
        read_record(path, TYPES)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"seconds": "x", "key": "a"}', '{"key": 1}'])
def test_text_of_another_form_is_damage(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"a\.json: damaged"):
        read_record(path, TYPES)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DamagedFile):
        read_record(path)


def test_a_record_of_an_earlier_version_has_no_digest_and_is_read(tmp_path):
    write_json(tmp_path / "a.json", VALUE)
    assert read_record(tmp_path / "a.json", TYPES) == VALUE


def test_every_flipped_byte_of_tensors_is_seen_or_changes_nothing(tmp_path):
    path, weights = tmp_path / "state.pt", {"a": torch.arange(40.0), "b": [3, "text"]}
    torch.save(weights, path)
    seen, content = 0, path.read_bytes()
    for place in range(0, len(content), 7):
        flip(path, place)
        try:
            value = read_tensors(path)
        except DamagedFile as error:
            assert "state.pt: damaged" in error.message
            seen += 1
        else:
            assert torch.equal(value["a"], weights["a"]) and value["b"] == weights["b"]
        path.write_bytes(content)
    start = content.index(weights["a"].numpy().tobytes())
    flip(path, start + 9)
    with pytest.raises(DamagedFile, match="check sum"):
        read_tensors(path)
    assert seen > 20


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive" * 100])
def test_what_is_damaged_is_set_aside_with_a_word_and_what_is_missing_is_not(tmp_path, capsys, content):
    path = tmp_path / "part.pt"
    assert intact(path, read_tensors) is None and capsys.readouterr().err == ""
    path.write_bytes(content)
    assert intact(path, read_tensors) is None
    assert os.listdir(tmp_path) == ["part.pt.damaged"]
    assert "part.pt: damaged" in capsys.readouterr().err
    torch.save({"other": 1}, path)
    assert intact(path, read_tensors, lambda saved: saved["statistics"]) is None
    path.mkdir()
    with pytest.raises(DamagedFile, match="a folder"):
        read_tensors(path)


@pytest.mark.parametrize("name, same_stat_is_enough", [("report.html", True), ("neon.safetensors", False)])
def test_a_file_is_known_by_size_time_and_hash(tmp_path, name, same_stat_is_enough):
    path = tmp_path / name
    path.write_bytes(b"abcd")
    known = identity(path)
    os.utime(path, ns=(0, 0))
    assert unchanged(path, known), "copied, or touched: the content counts"
    known[1] = 0
    flip(path, 1)
    os.utime(path, ns=(0, 0))
    assert unchanged(path, known) == same_stat_is_enough
    os.utime(path)
    assert not unchanged(path, known)
    path.unlink()
    assert not unchanged(path, known)


@pytest.mark.parametrize("error", [DamagedFile(Path("a.json"), "no JSON"), Stopped(signal.SIGTERM)])
def test_errors_reach_the_parent_of_a_worker(error):
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.exit_code == error.exit_code


def test_a_second_run_in_a_folder_is_refused_and_told_whose_it_is(tmp_path):
    with one_run(tmp_path / "out"):
        whose = f"{socket.gethostname()}, pid {os.getpid()}"
        with (
            pytest.raises(UserError, match=rf"out: another run is in this folder \({whose}\)"),
            one_run(tmp_path / "out"),
        ):
            raise AssertionError("two at once")
        with one_run(tmp_path / "other"):
            pass
    with one_run(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_at_the_start_is_one_sentence_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="not written, the disk is full"):
        patch.setattr(os, "fsync", full)
        with one_run(tmp_path):
            raise AssertionError("started")
    assert os.listdir(tmp_path) == []
    with one_run(tmp_path):
        pass


def test_a_start_removes_what_killed_writes_left_wherever_it_lies(tmp_path):
    left = [".state.pt.host-12-0.part", "a/b/.x.png.other.host-1-3.part"]
    kept = ["mine.part", "a/.hidden.part", "a/state.pt"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    with one_run(tmp_path):
        pass
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_a_file_system_without_locks_has_a_softer_one(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with one_run(tmp_path), pytest.raises(UserError, match="another run is in this folder"), one_run(tmp_path):
        pass
    with one_run(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
