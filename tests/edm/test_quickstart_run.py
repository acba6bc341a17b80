"""The quickstart end to end, very small: the record, what a second run finds, and what a killed one leaves."""

import dataclasses
import json
import multiprocessing
import re
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launch import forkserver, launch, start

from neon_core.merge import neon_merge
from neon_core.seeds import parse_seeds
from neon_core.selftrain import find_snapshots
from neon_edm.quickstart import main, pictures
from neon_edm.quickstart.main import broken, quickstart_run
from neon_edm.quickstart.one_seed import find_result, passes_per_seed, run_seed
from neon_edm.quickstart.parallel import Bars, run_seeds
from neon_edm.quickstart.settings import DEFAULT, FAST, base_training
from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_run.reproduce.ledger import status

SCRIPT = Path(__file__).parents[2] / "edm" / "quickstart.py"
PICO = dataclasses.replace(
    FAST,
    base=base_training(40),
    num_synthetic=60,
    num_evaluate=110,
    ranking_images=50,
    curve=(1.0,),
    feature_steps=20,
)


def ignore(stage, passes):
    """No bar."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, record, progress) of one very small run."""
    folder = tmp_path_factory.mktemp("quickstart") / "seed-3"
    counted = []
    result = run_seed(PICO, 3, folder, lambda stage, passes: counted.append((stage, passes)))
    return folder, result, counted


def test_the_merge_at_minus_one_is_the_self_trained_network(finished):
    folder, result, _ = finished
    assert result["minus_one_error"] < 1e-6 and result["step_length"] > 0.01 and broken([result]) == []
    base, syn = (
        read_checkpoint(max(find_snapshots(folder / name).values())).state for name in ("prepared/base", "finetune")
    )
    back = neon_merge(base, syn, -1.0)
    assert all(torch.allclose(back[name], syn[name], atol=1e-6) for name in syn)
    neon = read_checkpoint(folder / "neon.safetensors")
    assert neon.metadata["neon"]["w"] == result["w_star"]
    at_w_star = neon_merge(base, syn, result["w_star"])
    assert all(torch.equal(neon.state[name], at_w_star[name]) for name in at_w_star)


def test_training_of_the_base_is_shown_under_its_own_name(tmp_path, monkeypatch):
    tracked = []
    monkeypatch.setattr("neon_core.selftrain.track", lambda values, images: tracked.extend(values))
    row = dataclasses.replace(PICO, base=base_training(2), feature_steps=2).row(0)
    row.prepare(row, tmp_path, 0)
    assert {"base training/loss", "base training/lr"} == set(tracked)


def test_a_merge_that_misses_the_self_trained_network_is_reported(finished):
    wrong = {**finished[1], "minus_one_error": 1e-3, "step_length": 0.0}
    assert len(broken([wrong])) == 2


def test_the_folder_of_a_seed_is_that_of_neon_reproduce(finished):
    folder, result, _ = finished
    assert "complete:" in status(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["row"] == "edm/digits_fast" and results["best"]["w"] == result["w_star"]
    second = [p for p in results["points"]["evaluate"] if p["block"] == "second"]
    assert {"base", "random-direction", "real-data"} < {p["snapshot"] for p in second}
    by_place = {(p["snapshot"], p["w"]): p["fid_heldout"] for p in second}
    assert result["report"]["base"]["heldout"] == by_place["base", 0.0]
    assert result["report"]["real_data"]["heldout"] == by_place["real-data", -1.0]
    text = re.sub(r'<a class="term"[^>]*>(.*?)</a>', r"\1", (folder / "report.html").read_text(encoding="utf-8"))
    assert "feature distance" in text and "Against held-out images" in text and "FID" not in text
    assert text.count("data:image/png;base64,") == 3 * 60


def test_the_record_holds_every_point(finished):
    _, result, _ = finished
    assert {-1.0, 0.0, 1.0, result["w_star"]} == {point["w"] for point in result["curve"]}
    assert set(result["report"]) == {"base", "self_trained", "neon_fixed", "neon", "random_direction", "real_data"}
    numbers = [value for point in [*result["curve"], *result["report"].values()] for value in point.values()]
    assert np.isfinite(numbers).all() and min(point["heldout"] for point in result["report"].values()) > 0
    assert result["report"]["real_data"] != result["report"]["self_trained"] != result["report"]["base"]
    assert set(result["pixels"]) == {"base", "self_trained", "neon_fixed", "neon"}


def test_the_synthetic_set_is_seventeen_levels_with_balanced_labels(finished):
    folder, _, _ = finished
    entries = json.loads((folder / "synthetic" / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert len(entries) == 60 and np.bincount([label for _, label in entries]).tolist() == [6] * 10
    samples = pictures.read_samples(folder / "samples", 3)
    assert {name: images.shape for name, images in samples.items()} == dict.fromkeys(
        ("real", "self_trained", "base", "neon"), (60, 1, 8, 8)
    )
    assert all(set(np.unique(images)) <= {round(255 * v / 16) for v in range(17)} for images in samples.values())


def test_two_runs_share_no_noise():
    used = []
    for seed in (0, 1):
        row = PICO.row(seed)
        evaluated = parse_seeds(row.evaluate_seeds)
        synthetic = range(row.synthetic_seed, row.synthetic_seed + row.num_synthetic)
        used += [set(synthetic), {n for first in evaluated for n in (first, first + len(evaluated))}]
    assert sum(map(len, used)) == len(set().union(*used))


def test_progress_comes_near_the_announced_total(finished):
    *_, counted = finished
    assert sum(passes for _, passes in counted) == pytest.approx(passes_per_seed(PICO), rel=0.15)
    assert list(dict.fromkeys(stage for stage, _ in counted))[:4] == ["base", "synthetic set", "fine-tune", "choose w"]


def test_a_second_run_finds_the_record_and_one_cut_short_comes_to_the_same(finished):
    folder, result, _ = finished
    assert find_result(PICO, 3, folder) == result
    assert find_result(dataclasses.replace(PICO, num_evaluate=111), 3, folder) is None
    (folder / "summary.json").unlink()  # as if killed before the end
    (folder / "stages" / "evaluate.json").unlink()
    base = max(find_snapshots(folder / "prepared/base").values())
    written = base.stat().st_mtime_ns
    assert find_result(PICO, 3, folder) is None
    again = run_seed(PICO, 3, folder, ignore)
    assert base.stat().st_mtime_ns == written
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_other_settings_in_the_same_folder_are_refused(finished):
    folder, _, _ = finished
    longer = dataclasses.replace(PICO, base=base_training(50))
    with pytest.raises(UserError, match="name another --outdir"):
        run_seed(longer, 3, folder, ignore)


def test_the_parent_looks_up_from_the_bars_while_workers_keep_talking():
    class Chatter:
        def get(self, timeout):
            time.sleep(0.001)
            return 0, "base", 1

    bars, began = Bars([0], 1000), time.monotonic()
    bars.show(Chatter())
    assert time.monotonic() - began < 2 and bars.stages == {0: "base"}


def test_seeds_must_be_given_once(tmp_path):
    with pytest.raises(UserError, match="each once"):
        quickstart_run(fast=True, seeds=[1, 1], out_dir=tmp_path, num_workers=1)


def test_another_length_of_the_base_is_not_judged(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        main,
        "run_seeds",
        lambda quickstart, *rest: seen.append(quickstart) or (_ for _ in ()).throw(UserError("enough")),
    )
    with pytest.raises(UserError, match="enough"):
        quickstart_run(fast=False, base_steps=16000, seeds=[0], out_dir=tmp_path, num_workers=1)
    (quickstart,) = seen
    assert quickstart == dataclasses.replace(DEFAULT, base=base_training(16000), judged=False)


def test_bad_flags_are_one_line_and_status_2(tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    for flags, named in ((["--seeds", "zero"], "'zero'"), (["--out", blocker], str(blocker))):
        done = launch(SCRIPT, "--fast", *flags)
        assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr


def test_a_workers_error_reaches_the_user_in_one_line(tmp_path, monkeypatch):
    preloaded = forkserver()  # spares a worker's imports
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: preloaded)
    other = tmp_path / "seed-0" / "prepared" / "base" / "settings.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"seed": "another"}', encoding="utf-8")
    with pytest.raises(UserError, match="name another --out"):
        run_seeds(PICO, [0, 1], tmp_path, num_workers=1)
    assert not (tmp_path / "seed-1").exists()


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    """Starts a real run, whose worker imports torch: five seconds."""
    running = start(SCRIPT, "--fast", "--out", tmp_path)
    (process,) = running.processes
    try:
        started = tmp_path / "seed-0" / "prepared" / "base" / "settings.json"
        wait_for(started.exists, 240)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    finally:
        process.kill()  # the parent alone
        running.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 30)


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
