"""A run killed in every stage, or damaged in any of its files, ends with the numbers of an unbroken one, or says which
file it cannot make again."""

import dataclasses
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from core.pico_rows import CPU, PLAN, SlowPico, make_files, pico_row
from launch import kill_when, launch, start

from neon_core.distributed import session
from neon_files.atomic import write_json
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_files.run_files import one_run
from neon_run.reproduce.ledger import Ledger, status
from neon_run.reproduce.reproduction import Reproduction

SCRIPT = Path("tests/core/pico_reproduce.py")


def enough(folder: Path, pattern: str, num: int) -> bool:
    return len(list(folder.glob(pattern))) >= num


def test_killed_in_every_stage_on_other_numbers_of_ranks(tmp_path):
    """The fine-tune keeps to one process, since sums over ranks round differently and so do its weights."""
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    make_files(files)
    unbroken = Reproduction(pico_row(files), tmp_path / "unbroken", PLAN, CPU).run()
    stages = (
        ("generate", 2, "synthetic/**/*.png", 3),
        ("finetune", 0, "finetune/state.pt", 1),
        ("search", 2, "search/points/*.json", 3),
        ("evaluate", 0, "search/points/*-n200-*.json", 1),
    )
    for stage, ranks, pattern, num in stages:
        # Images are written while others are sampled, so there it is the second call that goes no further.
        hang = ":2" if stage == "generate" else f"{out / pattern}:{num}"
        process = start(SCRIPT, files, out, ranks=ranks, PICO_HANG=hang)
        kill_when(process, partial(enough, out, pattern, num), seconds=150)
        assert f"next: {stage};" in status(out)
    done = launch(SCRIPT, files, out, ranks=2)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for key, value in unbroken["best"].items():
        assert results["best"][key] == (value if key == "snapshot" else pytest.approx(value, rel=1e-9))
    for name in ("base", "neon", "gain"):
        assert results["intervals"][name] == pytest.approx(unbroken["intervals"][name], rel=1e-6)
    for name in ("base", "neon"):
        for key in ("fid", "is_mean", "is_std"):
            assert results["final"][name][key] == pytest.approx(unbroken["final"][name][key], rel=1e-6)
    costs = {cost["stage"]: cost for cost in results["ledger"]}
    assert [costs[stage]["starts"] for stage, *_ in stages] == [2, 2, 2, 2]
    assert {stage: cost.get("images") for stage, cost in costs.items()} == {
        cost["stage"]: cost.get("images") for cost in unbroken["ledger"]
    }
    assert "complete:" in status(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(files of the row, folder of a run, its results)."""
    files, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("finished")
    make_files(files)
    return files, out, Reproduction(pico_row(files), out, PLAN, CPU, "neon reproduce pico").run()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """One bit in the middle, with size and time as they were."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_json(path):
    path.write_text('{"key": [1]}', encoding="utf-8")


JSON, BYTES = (cut, empty, flip, other_json), (cut, empty, flip)
MADE_AGAIN = [
    *(("stages/search.json", damage) for damage in JSON),
    *(("stages/report.json", damage) for damage in JSON),
    *(("run.json", damage) for damage in JSON),
    *(("search/points", damage) for damage in JSON),
    *(("search/statistics", damage) for damage in BYTES),
    *(("neon.safetensors", damage) for damage in BYTES),
    *(("finetune/snapshot-000000080.safetensors", damage) for damage in BYTES),
    *(("finetune/snapshot-000000160.safetensors", damage) for damage in BYTES),
    ("results.json", cut),
    ("report.html", cut),
    ("synthetic/dataset.json", cut),
]


@pytest.mark.parametrize("name, damage", MADE_AGAIN, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_damaged_is_named_and_made_again(finished, tmp_path, capsys, name, damage):
    files, out, results = finished
    out = shutil.copytree(out, tmp_path / "out")
    broken = [out / name] if (out / name).is_file() else sorted((out / name).iterdir())
    for path in broken:
        damage(path)
    if name.startswith("search/"):  # so that points and statistics are needed again
        for stage in ("search", "evaluate"):
            (out / f"stages/{stage}.json").unlink()
        for point in (out / "search/points").iterdir() if name == "search/statistics" else ():
            point.unlink()
    assert "pico" in status(out) or name == "run.json"
    again = Reproduction(pico_row(files), out, PLAN, CPU).run()
    told = capsys.readouterr().err
    for path in broken if name != "run.json" else ():  # which every start writes anew
        assert f"{path}: damaged" in told
        assert path.with_name(path.name + ".damaged").exists() and path.exists()
    assert without_costs(again) == without_costs(results)
    log = [json.loads(line)["images"] for line in (out / "finetune/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log == list(range(8, 168, 8))
    assert f"complete: {out / 'report.html'}" in status(out)


def test_statistics_may_be_deleted_and_are_sampled_again_where_they_are_needed(finished, tmp_path):
    files, out, results = finished
    out = shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(out / "search/statistics")
    assert Reproduction(pico_row(files), out, dataclasses.replace(PLAN, resamples=12), CPU).run()["intervals"]["gain"]
    shutil.rmtree(out / "search/statistics")
    again = Reproduction(pico_row(files), out, PLAN, CPU).run()
    assert again["intervals"]["neon"] == pytest.approx(results["intervals"]["neon"], rel=1e-9)


def without_costs(results):
    return {
        key: results[key] for key in ("best", "intervals", "final", "second_block", "file_differs_by") if key in results
    }


@pytest.mark.parametrize("damage", (cut, empty, other_json))
@pytest.mark.parametrize("name", ["synthetic/manifest.json", "finetune/settings.json"])
def test_what_cannot_be_made_again_is_named_and_kept(finished, tmp_path, name, damage):
    files, out, _ = finished
    out = shutil.copytree(out, tmp_path / "out")
    for stage in ("generate", "finetune"):
        (out / f"stages/{stage}.json").unlink()
    damage(out / name)
    content = (out / name).read_bytes()
    with pytest.raises(UserError, match=f"{out / name}: damaged|holds a set made|holds a fine-tune with") as error:
        Reproduction(pico_row(files), out, PLAN, CPU).run()
    assert len(error.value.message.splitlines()) == 1 and (out / name).read_bytes() == content
    assert f"next: {'generate' if 'manifest' in name else 'finetune'}" in status(out)


def test_a_base_that_is_not_the_one_the_run_began_with_is_named(finished, tmp_path):
    files, plan = shutil.copytree(finished[0], tmp_path / "files"), dataclasses.replace(PLAN, controls=False)
    Reproduction(pico_row(files), tmp_path / "out", plan, CPU).run()
    flip(files / "base.safetensors")
    with pytest.raises(UserError, match=r"base\.safetensors: is not the base that this run began with"):
        Reproduction(pico_row(files), tmp_path / "out", plan, CPU).run()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": "x", "seconds": "long", "starts": 2}', None])
def test_a_clock_never_stops_a_run(tmp_path, text):
    clock = tmp_path / "stages/.generate.clock"
    clock.parent.mkdir()
    if text is None:
        (clock / "in the way").mkdir(parents=True)
    else:
        clock.write_text(text, encoding="utf-8")
    write_json(tmp_path / "run.json", {"row": "pico", "command": "neon", "keys": {}})
    assert "next: fetch" in status(tmp_path)
    ledger = Ledger(tmp_path)
    assert ledger.run("generate", {"n": 1}, [], lambda: {"outputs": {"a": 1}}) == {"a": 1}
    assert ledger.record("generate")["starts"] == 1


def test_status_tells_what_is_damaged_and_where_a_run_was_moved_from(finished, tmp_path):
    out = shutil.copytree(finished[1], tmp_path / "out")
    cut(out / "stages/merge.json")
    told = status(out)
    assert "merge to do merge.json: damaged" in told and "next: merge; go on with: neon reproduce pico" in told
    assert f"moved here from {finished[1]}: name {out} as --out instead" in told
    assert (out / "stages/merge.json").exists(), "status moves nothing"


def test_only_one_run_is_in_a_folder_and_its_next_start_clears_what_kills_left(finished, tmp_path):
    files, out, results = finished
    out = shutil.copytree(out, tmp_path / "out")
    with one_run(out), pytest.raises(UserError, match=r"another run is in this folder \(.+, pid \d+\)"):
        Reproduction(pico_row(files), out, PLAN, CPU).run()
    for name in ("finetune/.state.pt.host-1-0.part", "search/points/.a.json.host-1-3.part"):
        (out / name).write_text("", encoding="utf-8")
    assert Reproduction(pico_row(files), out, PLAN, CPU).run() == results
    assert not list(out.rglob("*.part")) and not list(out.rglob(".run*"))


@pytest.mark.parametrize("number, status_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("calls", [2, 30])  # of the sampler: while S is made, and while an evaluation runs
def test_a_signal_ends_the_run_with_the_command_that_goes_on(finished, tmp_path, monkeypatch, capsys, number,
                                                             status_code, calls):  # fmt: skip
    files, _, results = finished
    seen, plain = [], SlowPico.sample

    def sample(*args, **settings):
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), number)
        return plain(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(SlowPico, "sample", sample)
        patch.setattr("sys.argv", ["/somewhere/bin/neon", "reproduce", "pico", "--out", "a b"])
        with pytest.raises(SystemExit) as end, session("cpu") as device:
            Reproduction(pico_row(files), tmp_path / "out", PLAN, device).run()
    assert end.value.code == status_code and len(seen) == calls
    name = "SIGTERM" if status_code == 143 else "Ctrl-C"
    told = capsys.readouterr().err
    assert f"stopped by {name}; go on with: neon reproduce pico --out 'a b'\n" in told and "Traceback" not in told
    again = Reproduction(pico_row(files), tmp_path / "out", PLAN, CPU).run()
    assert without_costs(again) == without_costs(results)


def test_a_kill_behind_the_last_snapshot_leaves_a_whole_log_and_no_state(finished, tmp_path, monkeypatch):
    whole = [
        json.loads(line)["images"]
        for line in (finished[1] / "finetune/log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert whole == list(range(8, 168, 8))

    class Killed(BaseException):
        pass

    def write(path, *args, **options):
        write_checkpoint(path, *args, **options)
        if path.name == "snapshot-000000160.safetensors":
            raise Killed  # before anything else is done

    monkeypatch.setattr("neon_core.selftrain.write_checkpoint", write)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        Reproduction(pico_row(finished[0]), out, PLAN, CPU).run()
    assert (out / "finetune/state.pt").exists()
    assert (out / "finetune/log.jsonl").read_bytes() == (finished[1] / "finetune/log.jsonl").read_bytes()
    results = Reproduction(pico_row(finished[0]), out, PLAN, CPU).run()
    assert results["best"] == finished[2]["best"] and not (out / "finetune/state.pt").exists()
