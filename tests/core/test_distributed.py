"""What the environment of a launcher may say wrong, which device a rank takes, and how ranks come to see the same."""

import socket

import pytest
import torch
from launch import launch

from neon_core import distributed
from neon_core.distributed import agree, pick_device, session
from neon_files.errors import UserError
from neon_files.launcher import command_line

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture
def environment(monkeypatch):
    """Sets a launcher's variables, but for those that are None."""

    def set_to(**changes):
        for name, value in {**dict.fromkeys(LAUNCHER), **changes}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"MASTER_ADDR": None}, "RANK is set but MASTER_ADDR is not; start with torchrun, or unset RANK"),
        ({"RANK": "1", "WORLD_SIZE": None, "MASTER_PORT": None}, "RANK is set but WORLD_SIZE, MASTER_PORT is not"),
        ({"RANK": "one"}, "RANK is 'one', not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', not a number"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2; ranks count from 0"),
    ],
)
def test_a_launcher_that_says_too_little_is_refused_whatever_the_rank(environment, capsys, changes, problem):
    environment(**{**LAUNCHER, **changes})
    with pytest.raises(SystemExit) as end, session("cpu"):
        raise AssertionError("started")
    assert end.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_number_of_processes_without_a_launcher_is_refused(environment):
    environment(WORLD_SIZE="8")
    with pytest.raises(UserError, match="WORLD_SIZE is 8 but RANK is not set; start with torchrun"), session("cpu"):
        pass
    environment(WORLD_SIZE="1")
    with session("cpu") as device:
        assert device.type == "cpu" and distributed.world_size() == 1


def test_a_taken_port_is_named(environment, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment(**{**LAUNCHER, "WORLD_SIZE": "1", "MASTER_PORT": str(port)})
        with pytest.raises(SystemExit) as end, session("cpu"):
            pass
    assert end.value.code == 2
    assert f"127.0.0.1:{port}: this port is taken; set another MASTER_PORT" in capsys.readouterr().err


def test_ranks_that_do_not_meet_say_where(environment, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "START_TIMEOUT", distributed.timedelta(seconds=1))
    environment(**{**LAUNCHER, "RANK": "1", "MASTER_PORT": "9"})
    with pytest.raises(SystemExit), session("cpu"):
        pass
    assert "127.0.0.1:9: the ranks do not find each other there" in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch):
    def are(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return are


@pytest.mark.parametrize(
    "count, variables, name, index",
    [
        (8, {}, "auto", 0),
        (8, {"LOCAL_RANK": "3"}, "auto", 3),
        (8, {"LOCAL_RANK": "3"}, "cuda:5", 5),
        (1, {"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "6"}, "auto", 0),  # the launcher shows each its own
        (1, {"RANK": "3", "WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "6"}, "cuda", 0),
    ],
)
def test_each_rank_takes_its_own_gpu(environment, gpus, monkeypatch, count, variables, name, index):
    gpus(count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variables.pop("CUDA_VISIBLE_DEVICES", ""))
    environment(**variables)
    assert pick_device(name) == torch.device("cuda", index)


@pytest.mark.parametrize(
    "count, variables, name, problem",
    [
        (1, {"LOCAL_RANK": "1"}, "auto", "GPU 1 requested, 1 present"),
        (8, {"RANK": "1", "WORLD_SIZE": "2"}, "auto", "LOCAL_RANK is not"),
        (0, {}, "cuda", "--device cuda: no GPU is visible here"),
        (0, {}, "mps", "--device mps: not supported; choose auto, cpu or cuda"),
        (0, {}, "gpu", "--device gpu: not a device"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(environment, gpus, monkeypatch, count, variables, name, problem):
    gpus(count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    environment(**variables)
    with pytest.raises(UserError, match=problem):
        pick_device(name)


def views_of_others(monkeypatch, views):
    """Rank 1 sees one of `views` after the other."""
    later = iter(views)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, (*next(later), False)])
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)


def test_ranks_look_again_until_they_see_the_same(monkeypatch):
    views_of_others(monkeypatch, [("no such folder", True), (["a"], False), (["a", "b"], False)])
    looks = []
    assert agree("set", lambda: looks.append(1) or ["a", "b"]) == ["a", "b"] and len(looks) == 3


def test_an_error_that_all_ranks_see_is_raised_at_once(monkeypatch):
    def look():
        raise UserError("x: not there")

    views_of_others(monkeypatch, [("x: not there", True)])
    with pytest.raises(UserError, match=r"^x: not there$"):
        agree("set", look)


def test_what_differs_to_the_end_is_named(monkeypatch):
    monkeypatch.setenv("NEON_SHARED_FILES_SECONDS", "-1")
    views_of_others(monkeypatch, [(["a"], False)] * 2)
    with pytest.raises(UserError, match=r"set: rank 0 sees \['a', 'b'\], rank 1 sees \['a'\]; put it where all"):
        agree("set", lambda: ["a", "b"])


def test_a_process_group_outlives_its_session():
    """The destructor of one may wait forever with torch 2.5."""
    code = """
import weakref
import torch.distributed as dist
from neon_core.distributed import session

with session("cpu"):
    group = weakref.ref(dist.group.WORLD)
print(group() is not None, dist.is_initialized())
"""
    assert launch("-c", code, ranks=1).stdout == "True False\n"


@pytest.mark.parametrize(
    "argv, variables, line",
    [
        (["edm/finetune.py", "--outdir", "a b"], {}, "python edm/finetune.py --outdir 'a b'"),
        (["/usr/bin/neon", "status"], {}, "neon status"),
        (["/x/neon_run/__main__.py", "status"], {}, "python -m neon_run status"),
        (
            ["/x/neon_run/__main__.py"],
            {"RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nproc_per_node=4 -m neon_run",
        ),
    ],
)
def test_the_command_that_goes_on(environment, monkeypatch, argv, variables, line):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", variables.pop("LOCAL_WORLD_SIZE", "1"))
    environment(**variables)
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == line
