"""1, 2 and 3 ranks give the same images bit for bit and the same statistics; errors and kills leave nothing broken."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import environment, kill_when, launch, start, torchrun
from needs import SHARDS

from neon_files.checkpoint import read_checkpoint

SCRIPT = Path("tests/core/pico_run.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All stages under no launcher (0) and under 1, 2 and 3 gloo ranks. 41 images in batches of 4 divide by none, nor
    do the 4 micro batches of a step by 3."""
    folders = {}
    for ranks in (0, 1, 2, 3):
        folder = folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = launch(SCRIPT, "all", folder, ranks=ranks)
        assert done.returncode == 0 and "unused" not in done.stderr, done.stderr  # a warning of a needless search
    return folders


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_images_are_bit_identical(runs, ranks):
    one, many = files(runs[0] / "set"), files(runs[ranks] / "set")
    assert len([n for n in one if n.endswith(".png")]) == 41
    assert one == many


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_statistics_agree_to_rounding_and_on_every_rank(runs, ranks):
    one = torch.load(runs[0] / "stats-0.pt")
    for rank in range(ranks):
        many = torch.load(runs[ranks] / f"stats-{rank}.pt")
        for name in ("mean", "cov", "is"):
            torch.testing.assert_close(many[name], one[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stage, codes", [("generate", {1, 2}), ("evaluate", {2})])
def test_images_that_are_not_finite_end_all_ranks_with_one_sentence(tmp_path, stage, codes):
    """A set at once, an evaluation together: a sweep may go on from it."""
    done = launch(SCRIPT, stage, tmp_path, ranks=2, PICO_NAN="7")
    assert set(done.returncodes) == codes and "Traceback" not in done.stderr
    (line,) = re.findall("Error: .*", done.stderr)
    assert line.startswith("Error: seed 7: the network gave pixels that are not finite")


def test_three_ranks_mend_a_set(runs, tmp_path):
    shutil.copytree(runs[0] / "set", tmp_path / "set")
    images = sorted((tmp_path / "set").rglob("*.png"))
    for path in images[5:7]:
        path.unlink()
    images[30].write_bytes(images[30].read_bytes()[:-20])
    assert launch(SCRIPT, "generate", tmp_path, ranks=3).returncode == 0
    assert files(tmp_path / "set") == files(runs[0] / "set")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_training(ours: Path, theirs: Path) -> None:
    assert len(log(ours)) == len(log(theirs)) == 20
    for a, b in zip(log(ours), log(theirs), strict=True):
        assert a["images"] == b["images"] and a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    a, b = (read_checkpoint(folder / "run/snapshot-000000160.safetensors").state for folder in (ours, theirs))
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_agrees_over_ranks_also_where_some_have_more_micro_batches(runs, ranks):
    assert_same_training(runs[ranks], runs[0])


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (5, ["--checkpointing"]),  # the fifth rank has no micro batch
        pytest.param(2, ["--mode", "fsdp"], marks=SHARDS),
        pytest.param(3, ["--mode", "fsdp", "--checkpointing"], marks=SHARDS),
    ],
)
def test_sharding_checkpointing_and_idle_ranks_change_no_training(runs, tmp_path, ranks, flags):
    (tmp_path / "set").symlink_to(runs[0] / "set")
    done = launch(SCRIPT, "finetune", tmp_path, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path, runs[0])


@pytest.mark.parametrize(
    ("stage", "text"),
    [("fail", "RuntimeError: rank zero breaks"), ("user_error", "--flag 7: not what was expected; use 8")],
)
def test_a_failing_rank_ends_all_with_its_message_once(tmp_path, stage, text):
    """By themselves: no launcher ends the rank that waits for the failed one."""
    done = launch(SCRIPT, stage, tmp_path, ranks=2)
    assert all(code > 0 for code in done.returncodes)
    assert done.stderr.count(text) == 1, done.stderr
    assert "rank_0_done" not in done.stdout


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_passes_on_their_failure(runs, tmp_path):
    """The one test with the real launcher, which takes several seconds: a set is made, then a rank fails."""
    done = torchrun(SCRIPT, "user_error", tmp_path, ranks=2)
    assert done.returncode != 0 and done.stderr.count("--flag 7: not what was expected; use 8") == 1, done.stderr
    assert files(tmp_path / "set") == files(runs[0] / "set")


def test_a_killed_generation_goes_on_and_keeps_what_was_finished(runs, tmp_path):
    process = start(SCRIPT, "generate", tmp_path, ranks=2, PICO_PAUSE=0.2)
    kill_when(process, lambda: len(list((tmp_path / "set").rglob("*.png"))) >= 12)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*.png")}
    assert 0 < len(kept) < 41 and not (tmp_path / "set/dataset.json").exists()
    assert launch(SCRIPT, "generate", tmp_path).returncode == 0
    assert files(tmp_path / "set") == files(runs[0] / "set")
    untouched = sum(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert untouched >= len(kept) - 2 * 4, "finished batches were made again"


def test_a_killed_fine_tune_goes_on_exactly(runs, tmp_path):
    (tmp_path / "set").symlink_to(runs[0] / "set")
    process = start(SCRIPT, "finetune", tmp_path, PICO_PAUSE=0.04)
    kill_when(process, lambda: (tmp_path / "run/state.pt").exists())
    assert launch(SCRIPT, "finetune", tmp_path).returncode == 0
    assert (tmp_path / "run/log.jsonl").read_text(encoding="utf-8") == (runs[0] / "run/log.jsonl").read_text(
        encoding="utf-8"
    )
    for name in ("snapshot-000000080.safetensors", "snapshot-000000160.safetensors"):
        ours, whole = read_checkpoint(tmp_path / "run" / name), read_checkpoint(runs[0] / "run" / name)
        assert all(torch.equal(ours.state[k], whole.state[k]) for k in whole.state)


@pytest.mark.parametrize("who, ranks", [("", 0), ("1", 2)])
def test_a_fine_tune_that_is_asked_to_stop_writes_its_state_on_all_ranks(runs, tmp_path, who, ranks):
    """SIGTERM to one rank, within step 13 of 20; the last snapshot's state is of step 10."""
    (tmp_path / "set").symlink_to(runs[0] / "set")
    done = launch(SCRIPT, "finetune", tmp_path, ranks=ranks, PICO_STOP=f"{who}:{4 * 12 // max(ranks, 1) + 1}")
    assert set(done.returncodes) == {143}
    start = "torchrun --nproc_per_node=1" if ranks else "python"
    lines = re.findall(f"^stopped by SIGTERM; go on with: {start} .*pico_run.py finetune", done.stderr, re.MULTILINE)
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["images_seen"] == 8 * 13
    assert launch(SCRIPT, "finetune", tmp_path).returncode == 0
    assert_same_training(tmp_path, runs[0])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (runs[0] / "run").iterdir()}


def test_an_evaluation_that_is_asked_to_stop_keeps_its_sums(runs, tmp_path):
    done = launch(SCRIPT, "evaluate", tmp_path, ranks=2, PICO_STOP=":3")
    assert set(done.returncodes) == {143} and done.stderr.count("go on with") == 1
    assert len(list((tmp_path / "eval").glob("partial-*/rank-*.pt"))) == 2
    done = launch(SCRIPT, "evaluate", tmp_path)
    assert done.returncode == 0 and "continuing: 6 of 11 batches" in done.stdout
    one, resumed = torch.load(runs[0] / "stats-0.pt"), torch.load(tmp_path / "stats-0.pt")
    torch.testing.assert_close(resumed["cov"], one["cov"], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_workers_stop_when_their_launcher_was_killed(runs, tmp_path):
    (tmp_path / "set").symlink_to(runs[0] / "set")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    launcher = subprocess.Popen([*command, "finetune", tmp_path], env=environment(PICO_PAUSE=0.2))
    limit = time.monotonic() + 60
    while not (tmp_path / "run/log.jsonl").exists():
        assert time.monotonic() < limit and launcher.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(workers, timeout=40)
    for worker in alive:
        worker.kill()
    assert len(gone) == 2 and not alive
    assert (tmp_path / "run/state.pt").exists()


def test_ranks_that_see_another_set_look_again_and_then_say_what_differs(runs, tmp_path):
    """Rank 1's folder stands for a file system that shows the last image late, or never."""
    (tmp_path / "set").symlink_to(runs[0] / "set")
    late = shutil.copytree(runs[0] / "set", tmp_path / "late")
    last = max(late.rglob("*.png"))
    last.rename(tmp_path / "kept.png")
    done = launch(SCRIPT, "finetune", tmp_path, ranks=2, PICO_SET_1=late, NEON_SHARED_FILES_SECONDS=1)
    assert set(done.returncodes) == {2} and not (tmp_path / "run").exists()
    assert re.search("rank 0 sees 41 images .*, rank 1 sees .* 40 images", done.stderr), done.stderr
    assert done.stderr.count("Error:") == 1
    process = start(SCRIPT, "finetune", tmp_path, ranks=2, PICO_SET_1=late)
    time.sleep(2)
    assert process.poll() is None
    (tmp_path / "kept.png").rename(last)
    assert process.wait(60) == 0
    assert_same_training(tmp_path, runs[0])


def test_a_killed_evaluation_goes_on_with_another_number_of_ranks(runs, tmp_path):
    process = start(SCRIPT, "evaluate", tmp_path, "--save_seconds", 0, ranks=2, PICO_PAUSE=0.15)
    kill_when(process, lambda: len(list((tmp_path / "eval").glob("partial-*/rank-*.pt"))) == 2)
    done = launch(SCRIPT, "evaluate", tmp_path)
    assert done.returncode == 0 and "continuing:" in done.stdout
    one, resumed = torch.load(runs[0] / "stats-0.pt"), torch.load(tmp_path / "stats-0.pt")
    for name in ("mean", "cov", "is"):
        torch.testing.assert_close(resumed[name], one[name], rtol=1e-12, atol=1e-13)
    assert not (tmp_path / "eval").exists(), "nothing is left of a finished evaluation"
