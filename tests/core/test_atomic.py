import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from launch import launch

from neon_files import atomic
from neon_files.atomic import atomic_path, remove_stale, sha256_file, write_json
from neon_files.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_file_appears_whole_and_replaces_the_old_one(tmp_path):
    final = tmp_path / "new" / "folder" / "x.json"
    for value in ({"a": 1}, {"b": 2}):
        write_json(final, value)
        assert json.loads(final.read_text(encoding="utf-8")) == value
    assert os.listdir(final.parent) == ["x.json"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00fc" * 127, "n" * 140])
def test_the_longest_name_that_a_file_system_takes(tmp_path, name):
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / name) as temporary:
        dead = temporary.with_name(temporary.name.replace(f"-{os.getpid()}-", "-999999999-"))
        dead.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    remove_stale(tmp_path / f"{name[:-1]}x")  # another file
    assert len(os.listdir(tmp_path)) == 2
    remove_stale(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), UserError("x")])
def test_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    final = tmp_path / "x"
    final.write_text("good", encoding="utf-8")
    with pytest.raises(type(error)), atomic_path(final) as temporary:
        assert temporary.parent == final.parent
        temporary.write_text("half", encoding="utf-8")
        assert final.read_text(encoding="utf-8") == "good"
        raise error
    assert final.read_text(encoding="utf-8") == "good" and os.listdir(tmp_path) == ["x"]


def test_full_disk_is_told_and_keeps_the_old_file(tmp_path, monkeypatch):
    final = tmp_path / "x"
    final.write_text("good", encoding="utf-8")
    with pytest.raises(UserError, match=r"x: not written, the disk is full"), atomic_path(final) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert final.read_text(encoding="utf-8") == "good" and os.listdir(tmp_path) == ["x"]


def test_disk_that_fills_only_at_fsync_is_told(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("whole, as far as write() knew", encoding="utf-8")
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, sys, torch
from neon_files.errors import UserError
from neon_files.atomic import atomic_path
from neon_files.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
state = {"a": torch.ones(100_000)}
try:
    if sys.argv[1] == "torch":
        with atomic_path(sys.argv[2]) as temporary:
            torch.save(state, temporary)
    else:
        write_checkpoint(sys.argv[2], state)
except UserError as error:
    print(error.message)
"""


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_real_write_beyond_the_limit_of_the_system(tmp_path, writer):
    final = tmp_path / "x"
    final.write_text("good", encoding="utf-8")
    result = launch("-c", LIMITED, writer, final)
    assert (str(final) in result.stdout and "not written" in result.stdout) or "could not be written" in result.stdout
    assert final.read_text(encoding="utf-8") == "good" and os.listdir(tmp_path) == ["x"], result.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_folder_that_cannot_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write there"), atomic_path(blocker / "x") as temporary:
        temporary.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a folder"), atomic_path(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write there"), atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("", encoding="utf-8")
    finally:
        tmp_path.chmod(0o700)


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        (tmp_path / "other").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == []


def test_only_temporaries_of_dead_processes_are_removed(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = atomic.socket.gethostname()
    dead = tmp_path / f".x[1].{host}-{int(child.stdout)}-0.part"
    kept = [f".x[1].{host}-{os.getpid()}-0.part", f".x[1].elsewhere-{int(child.stdout)}-0.part", f".x1.{host}-1-0.part"]
    for path in (dead, *(tmp_path / name for name in kept)):
        path.write_text("", encoding="utf-8")
    remove_stale(tmp_path / "x[1]")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_hash_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert torch.cuda.is_initialized() is False
