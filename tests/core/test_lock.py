"""Locks on file systems with flock, without it, and with a broken one."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from download_place import A, Place

from neon_files.errors import UserError
from neon_files.lock import Timeout, locked
from neon_run.merging.folders import atomic_folder


def break_flock(monkeypatch, code: str) -> None:
    def broken(descriptor, how):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", broken)


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "ENOTSUP"])
def test_file_system_without_flock_has_a_softer_lock(server, tmp_path, monkeypatch, code):
    break_flock(monkeypatch, code)
    place = Place(tmp_path, server)
    assert place.run()[0] == 0 and place.good()
    with locked(tmp_path / "x.lock"), pytest.raises(Timeout), locked(tmp_path / "x.lock", timeout=0):
        pass
    with locked(tmp_path / "x.lock", timeout=0):
        pass


def test_file_in_a_folder_of_somebody_else_is_used_as_it_is(server, tmp_path, monkeypatch):
    place = Place(tmp_path, server, "hub")
    place.a.parent.mkdir(parents=True)
    place.a.write_bytes(A)
    break_flock(monkeypatch, "EROFS")
    code, out, err = place.run("a.pth")
    assert code == 0 and "a.pth: unverified" in out and server.requests == []
    assert "a.pth: present, not verified" in err and "cannot write there (Read-only file system)" in err


@pytest.mark.parametrize("code", ["ENOLCK", "EIO"])
def test_folders_are_written_without_flock_too(tmp_path, monkeypatch, code):
    break_flock(monkeypatch, code)
    if code == "EIO":  # of a disk, not of a missing feature
        with (
            pytest.raises(UserError, match=r"out: cannot write there \(Input/output error\)"),
            atomic_folder(tmp_path / "out"),
        ):
            pass
    else:
        with atomic_folder(tmp_path / "out") as folder, pytest.raises(UserError, match="another process is writing it"):
            (folder / "x").touch()
            with atomic_folder(tmp_path / "out"):
                pass
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


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
