"""Several machines, as docs/many_machines.md starts them: a torchrun on each, one folder that all see."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from core.pico_rows import make_files
from launch import ROOT, environment

PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agents(script: str, *args: Path, nodes: int) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of the torchrun of each machine, which find each other on the loopback."""
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test",
               "--local_addr=127.0.0.1"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1", *meeting]
    command += [str(ROOT / script), *map(str, args)]
    options = {"env": environment(), "cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, **options) for _ in range(nodes)]
    try:
        texts = [agent.communicate(timeout=300) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    return [(agent.returncode, *text) for agent, text in zip(started, texts, strict=True)]


def test_two_machines_take_a_row_from_its_set_to_its_report_in_one_shared_folder(tmp_path):
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    make_files(files)
    ended = agents("tests/core/pico_reproduce.py", files, out, nodes=2)
    assert [code for code, *_ in ended] == [0, 0], ended
    printed = sorted("gain" in stdout for _, stdout, _ in ended)
    assert printed == [False, True], "rank 0 alone prints"
    assert (out / "report.html").exists() and len(list(out.glob("synthetic/**/*.png"))) == 40
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "stages").glob("*.json")]
    assert len(records) == 7 and all(record["world_size"] == 2 for record in records)
    assert not [path for path in out.rglob("*") if re.search(r"\.(part|lock|owner|clock)$", path.name)]


SRUN = """#!/bin/bash
trap 'exit 143' TERM
touch up
[ -z "$FAILS" ] || exit 1
sleep 60 &
wait
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && echo "$2" > requeued
echo a-host
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("fails", [False, True], ids=["stopped", "failed"])
def test_the_batch_script_asks_for_another_start_when_it_is_stopped_and_not_after_an_error(tmp_path, fails):
    """Slurm's commands are stand-ins."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", PAGE, flags=re.S)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", script)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "FAILS": "1" if fails else ""}
    job = subprocess.Popen(["bash", str(tmp_path / "job")], cwd=tmp_path, env=env, start_new_session=True)
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        if not fails:
            job.terminate()
        assert job.wait(60) == (1 if fails else 143)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # the stand-in's sleep
    assert (tmp_path / "requeued").exists() is not fails
