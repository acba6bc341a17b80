"""A row from its files to its report: what it finds, what it costs, what it keeps, and what a restart does again."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from core.pico import PicoBackbone, PixelMoments
from core.pico_rows import CPU, PLAN, TRUE_CONTRAST, TRUE_W, SlowPico, make_files, pico_row

from neon_core.merge import neon_merge
from neon_core.synthetic import generate_set
from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference, load_reference, write_reference
from neon_run.reproduce.ledger import STAGES, Ledger, status
from neon_run.reproduce.pages import page
from neon_run.reproduce.report import view
from neon_run.reproduce.reproduction import Reproduction
from neon_run.row import Range
from neon_run.search.growing import GrowingSweep
from neon_run.search.sweep import find_checkpoints


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """(folder, results) of an unbroken run."""
    out = tmp_path_factory.mktemp("whole")
    return out, Reproduction(pico_row(files), out, PLAN, CPU, "neon reproduce pico").run()


def copied(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "out")


def words(page):
    """A report without the links into its glossary, which may stand within a sentence."""
    return re.sub(r'<a class="term"[^>]*>(.*?)</a>', r"\1", page)


def records(out):
    return {stage: (out / "stages" / f"{stage}.json").stat().st_mtime_ns for stage in STAGES}


def test_the_run_finds_the_planted_optimum_and_the_controls_do_not(whole):
    _, results = whole
    best, gain = results["best"], results["intervals"]["gain"]
    assert gain["low"] > 0, "the difference must be seen through the noise"
    assert results["final"]["neon"]["fid"] < 0.35 * results["final"]["base"]["fid"]
    assert best["settings"]["contrast"] == pytest.approx(TRUE_CONTRAST, abs=0.12)
    if best["snapshot"] == "snapshot-000000080":
        assert best["w"] == pytest.approx(TRUE_W, abs=0.5)
    at = {(p["snapshot"], p["w"]): p["fid"] for p in results["points"]["evaluate"] if p["num_images"] == 80}
    neon = at[best["snapshot"], best["w"]]
    assert neon < 0.5 * at["random-direction", best["w"]] and neon < 0.5 * at[best["snapshot"], -1.0]


def test_the_written_network_is_the_merge_of_its_files(whole, files):
    out, results = whole
    best = results["best"]
    ends = (
        read_checkpoint(path).state
        for path in (files / "base.safetensors", out / f"finetune/{best['snapshot']}.safetensors")
    )
    written = read_checkpoint(out / "neon.safetensors").state
    expected = neon_merge(*ends, best["w"])
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert results["provenance"]["neon"]["differs_from_measured_by"] == 0


def test_more_training_on_real_data_is_a_control(whole, files, tmp_path):
    out = copied(whole, tmp_path)
    plan = dataclasses.replace(PLAN, real_training=files / "set", second_block=False)
    results = Reproduction(pico_row(files), out, plan, CPU).run()
    at = {(p["snapshot"], p["w"]): p["fid"] for p in results["points"]["evaluate"] if p["num_images"] == 80}
    # given S itself for real data, it must be plain self-training
    assert at["real-data", -1.0] == pytest.approx(at[results["best"]["snapshot"], -1.0], rel=1e-3)
    assert "as much more training on real data" in words((out / "report.html").read_text(encoding="utf-8"))
    cost = next(cost for cost in results["ledger"] if cost["stage"] == "evaluate")
    assert cost["training_images"] == int(results["best"]["snapshot"].split("-")[1])


def test_controls_belong_to_the_snapshot_that_was_chosen_last(whole, files, tmp_path):
    out, first = copied(whole, tmp_path), whole[1]["best"]["snapshot"]
    plan = dataclasses.replace(PLAN, real_training=files / "set")
    chosen = [Reproduction(pico_row(files), out, dataclasses.replace(plan, snapshots=n), CPU).run() for n in (4, 1)]
    snapshots = [results["best"]["snapshot"] for results in chosen]
    assert snapshots == [first, "snapshot-000000160"] and first != snapshots[1]
    for name in snapshots:
        control = read_checkpoint(out / f"controls/random-direction-{name}-seed0.safetensors")
        assert control.metadata["as_long_as"] == name
        base, syn = (
            read_checkpoint(files / "base.safetensors").state,
            read_checkpoint(out / f"finetune/{name}.safetensors").state,
        )
        ours, theirs = (end["out.weight"] - base["out.weight"] for end in (control.state, syn))
        assert ours.norm() == pytest.approx(float(theirs.norm()), rel=1e-4)
    assert {path.name for path in (out / "controls").glob("real-data-*")} == {"real-data-80", "real-data-160"}


def test_the_ledger_counts_every_image_that_was_sampled(files, tmp_path, monkeypatch):
    seen = []
    plain = PicoBackbone.sample
    monkeypatch.setattr(
        PicoBackbone, "sample", lambda self, seeds, *a, **k: seen.extend(seeds) or plain(self, seeds, *a, **k)
    )
    results = Reproduction(pico_row(files), tmp_path, PLAN, CPU).run()
    counted = sum(cost.get("images", 0) for cost in results["ledger"])
    samples = 3 * 24
    assert counted == len(seen) - samples
    assert sum(cost.get("network_evaluations", 0) for cost in results["ledger"]) == counted
    search = next(cost for cost in results["ledger"] if cost["stage"] == "search")
    on_disk = [
        torch.load(path, weights_only=True)["seen"].sum() for path in (tmp_path / "search/statistics").glob("*.pt")
    ]
    assert search["images"] < sum(on_disk) == counted - 40


def test_a_finished_run_does_nothing_again_and_a_change_redoes_what_hangs_on_it(whole, files, tmp_path, monkeypatch):
    out = copied(whole, tmp_path)
    before = records(out)

    def never(*args, **kwargs):
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(SlowPico, "sample", never)
        again = Reproduction(pico_row(files), out, PLAN, CPU).run()
    assert again == whole[1] and records(out) == before
    changed = dataclasses.replace(PLAN, resamples=12)
    Reproduction(pico_row(files), out, changed, CPU).run()
    after = records(out)
    assert [stage for stage in STAGES if after[stage] != before[stage]] == ["evaluate", "report"]
    (out / "neon.safetensors").unlink()
    Reproduction(pico_row(files), out, changed, CPU).run()
    assert (out / "neon.safetensors").exists()


def test_lost_images_are_made_again_by_the_same_command(whole, files, tmp_path):
    out = copied(whole, tmp_path)
    before, stamps = {p: p.read_bytes() for p in (out / "synthetic").rglob("*.png")}, records(out)
    for path in list(before)[::4]:
        path.unlink()
    Reproduction(pico_row(files), out, PLAN, CPU).run()
    assert before == {p: p.read_bytes() for p in (out / "synthetic").rglob("*.png")}
    assert [stage for stage, stamp in records(out).items() if stamp != stamps[stage]] == ["generate"]


def test_another_base_file_redoes_everything_or_says_why_not(whole, files, tmp_path):
    out = copied(whole, tmp_path)
    other = tmp_path / "other.safetensors"
    from neon_files.checkpoint import write_checkpoint

    base = PicoBackbone.fresh(seed=4)
    write_checkpoint(other, base.net.state_dict(), config=base.network_config())
    with pytest.raises(UserError, match="holds a set made with base"):
        Reproduction(pico_row(files), out, dataclasses.replace(PLAN, base=other), CPU).run()


def test_the_grid_is_the_official_one(whole, files, tmp_path):
    out = copied(whole, tmp_path)
    results = Reproduction(
        pico_row(files), out, dataclasses.replace(PLAN, search="official", controls=False), CPU
    ).run()
    points = results["points"]["search"]
    assert {p["num_images"] for p in points} == {60} and {p["w"] for p in points} <= {0.0, 1.0, 2.0}
    assert {p["snapshot"] for p in points} == {"base", "snapshot-000000080", "snapshot-000000160"}
    assert results["best"]["w"] in (1.0, 2.0) and results["best"]["settings"]["contrast"] in (0.8, 1.0, 1.2)


def test_a_row_without_guidance(files, tmp_path):
    plan = dataclasses.replace(PLAN, controls=False, second_block=False)
    results = Reproduction(pico_row(files, guided=False), tmp_path, plan, CPU).run()
    assert results["best"]["settings"] == {} and results["second_block"] is None
    assert results["final"]["neon"]["fid"] < results["final"]["base"]["fid"]
    assert "Controls" not in (tmp_path / "report.html").read_text(encoding="utf-8")


class Levelled(SlowPico):
    """Grey levels are a second setting of the sampler, a whole number; the fewer, the farther from real."""

    def sample(self, seeds, labels, contrast=1.0, levels=256):
        assert type(levels) is int
        step = 256 // levels
        return super().sample(seeds, labels, contrast) // step * step


def test_two_settings_are_searched_with_w_and_the_base_is_compared_at_its_own_best_of_both(files, tmp_path):
    row = dataclasses.replace(
        pico_row(files),
        backbone=Levelled,
        evaluate={"contrast": 1.0, "levels": 16},
        axes={"contrast": Range(0.5, 1.5), "levels": Range(4, 64, whole=True)},
    )
    plan = dataclasses.replace(PLAN, snapshots=1)
    results = Reproduction(row, tmp_path, plan, CPU).run()
    best, of_base = results["best"]["settings"], results["base_best"]["settings"]
    assert list(best) == list(of_base) == ["contrast", "levels"] and best != of_base
    assert best["levels"] > 16 and type(best["levels"]) is int
    searched = [p["settings"] for p in results["points"]["search"] if p["w"] == 0]
    assert of_base in searched and len({tuple(settings.items()) for settings in searched}) >= 10
    compared = [p["settings"] for p in results["points"]["evaluate"] if p["snapshot"] == "base"]
    assert best in compared and of_base in compared
    text = words((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert text.count("<svg") == 3 and "w, contrast and levels" in text
    assert "base, at its own best contrast, levels" in text and "The other settings vary too" in text


def test_the_report_stands_alone_and_tells_the_numbers(whole):
    out, results = whole
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "http" not in text and "<script" not in text
    assert text.count("data:image/png;base64,") == 3 * 24 and text.count("<svg") == 2
    text = words(text)
    assert "Neon lowers the FID by" in text and "random direction of equal length" in text
    for name in ("base", "neon"):
        assert f"{results['final'][name]['fid']:.3g}" in text
    assert results["provenance"]["neon"]["sha256"] in text
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results


def test_the_report_can_be_read_by_everyone(whole):
    """Contents lead to sections, pictures have alternative texts, cells know their column, both themes are there."""
    text = (whole[0] / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'<section id="(\w+)">', text)
    assert (
        re.findall(r'<li><a href="#(\w+)">', text)
        == ids
        == ["result", "curve", "controls", "samples", "cost", "provenance", "glossary"]
    )
    links, places = re.findall(r'href="#([\w-]+)"', text), re.findall(r' id="([\w-]+)"', text)
    assert set(links) <= set(places) and len(set(places)) == len(places)
    defined = {place for place in places if place.startswith("term-")}
    assert {"term-w", "term-snapshot", "term-random-control"} <= defined <= set(links)
    assert "term-real-data-control" not in defined, "this run has no such control"
    pictures = re.findall(r'<img alt="([^"]*)"', text)
    assert len(set(pictures)) == 3 * 24 and pictures[0] == "base, seed 1000"
    assert '<td data-label="95 % interval">' in text and "td::before { content: attr(data-label)" in text
    assert "prefers-color-scheme: dark" in text and 'name="color-scheme" content="light dark"' in text
    assert "overflow-x" not in text, "nothing scrolls sideways"


def test_what_a_run_names_is_text_in_its_report(whole):
    out, results = whole
    evil = {**results, "row": "a<script>/b&", "best": {**results["best"], "snapshot": "<b>"}}
    text = page("report.html", view(evil, out / "samples"))
    assert "<script" not in text and "a&lt;script&gt;/b&amp;" in text and "<em>&lt;b&gt;</em>" in text


def test_real_images_add_their_metrics_and_too_few_seeds_for_them_are_refused_at_once(files, tmp_path):
    generate_set(PicoBackbone.fresh(seed=3), range(5000, 6000), tmp_path / "real", settings={}, batch_size=200)
    plan = dataclasses.replace(PLAN, real_images=tmp_path / "real", controls=False, second_block=False)
    row = dataclasses.replace(pico_row(files), batch_size=200)
    with pytest.raises(UserError, match="KID with subsets of 1000"):
        Reproduction(row, tmp_path / "few", plan, CPU).run()
    assert not (tmp_path / "few/synthetic").exists()
    row = dataclasses.replace(row, evaluate_seeds="1000-1999")
    results = Reproduction(row, tmp_path / "out", plan, CPU).run()
    for name in ("base", "neon"):
        assert {"kid_mean", "precision", "recall", "density", "coverage"} <= set(results["final"][name])
    assert "KID x 1000" in words((tmp_path / "out/report.html").read_text(encoding="utf-8"))


def test_a_second_reference_is_told_everywhere_and_searched_on_nowhere(whole, files, tmp_path):
    found = {}
    for name, heldout in (("mean", 0.0), ("shifted", 0.3)):
        reference = load_reference(files / "pico.npz")
        path = tmp_path / f"{name}.npz"
        write_reference(path, Reference(reference.mu + heldout, reference.sigma))
        plan = dataclasses.replace(PLAN, heldout=path)
        found[name] = Reproduction(pico_row(files), tmp_path / name, plan, CPU).run()
    assert found["mean"]["best"] == found["shifted"]["best"] == whole[1]["best"]
    for point in found["mean"]["points"]["evaluate"]:
        assert point["fid_heldout"] == pytest.approx(point["fid"], rel=1e-9)
    for point in found["shifted"]["points"]["evaluate"]:
        assert point["fid_heldout"] > point["fid"] + 0.5
    text = (tmp_path / "shifted" / "report.html").read_text(encoding="utf-8")
    assert f"{found['shifted']['second_block']['neon']['fid_heldout']:.4f}" in text
    assert "held out" not in (whole[0] / "report.html").read_text(encoding="utf-8")


def test_controls_are_measured_on_seeds_that_the_search_has_not_seen(whole):
    controls = [p for p in whole[1]["points"]["evaluate"] if p["snapshot"] == "random-direction" or p["w"] == -1]
    assert len(controls) == 2 and {p["block"] for p in controls} == {"second"}


@dataclasses.dataclass(frozen=True)
class Copied:
    """A row's files made on the spot: here, copied."""

    source: str
    training_images: int = 123

    def __call__(self, row, folder, seed):
        folder.mkdir(parents=True, exist_ok=True)
        names = {"base": "base.safetensors", "reference": "pico.npz", "heldout": "pico.npz"}
        made = {key: folder / f"{key}-{name}" for key, name in names.items()}
        for key, path in made.items():
            shutil.copy(Path(self.source) / names[key], path)
        return made


def test_a_row_may_make_what_others_fetch(whole, files, tmp_path):
    row = dataclasses.replace(pico_row(files), prepare=Copied(str(files)))
    results = Reproduction(row, tmp_path / "out", PLAN, CPU).run()
    assert results["best"] == whole[1]["best"]
    assert results["provenance"]["files"]["base"]["path"] == "prepared/base-base.safetensors"
    assert results["ledger"][0]["training_images"] == 123
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    (moved / "stages/evaluate.json").unlink()
    again = Reproduction(row, moved, PLAN, CPU).run()
    assert again["final"] == results["final"], "a folder may be moved and goes on"
    (moved / "prepared/heldout-pico.npz").unlink()
    Reproduction(row, moved, PLAN, CPU).run()
    assert (moved / "prepared/heldout-pico.npz").exists()


def test_status_tells_what_is_done_and_what_is_next(whole, tmp_path):
    out = copied(whole, tmp_path)
    assert f"complete: {out / 'report.html'}" in status(out)
    (out / "stages/search.json").unlink()
    told = status(out)
    assert "next: search; go on with: neon reproduce pico" in told
    assert re.search(r"finetune done", told) and re.search(r"evaluate to do", told)
    with pytest.raises(UserError, match="neon reproduce"):
        status(tmp_path)


def test_seconds_of_stopped_starts_are_counted(tmp_path):
    for start in (1, 2):
        ledger = Ledger(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            ledger.run("generate", {"n": 1}, [], lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        clock = json.loads((tmp_path / "stages/.generate.clock").read_text(encoding="utf-8"))
        assert clock["starts"] == start
    (tmp_path / "stages/.generate.clock").write_text(json.dumps({**clock, "seconds": 100.0}), encoding="utf-8")
    ledger.run("generate", {"n": 1}, [], dict)
    record = ledger.record("generate")
    assert 100 <= record["cost"]["seconds"] < 110 and record["starts"] == 3


def sweep(files, whole, out, backbone=None):
    evaluator = Evaluator(files / "pico.npz", device=CPU, metrics=("fid", "is"), detector=PixelMoments())
    backbone = backbone or SlowPico.load(files / "base.safetensors", CPU)
    found = find_checkpoints(whole[0] / "finetune")
    options = {"settings": {"contrast": 1.0}, "batch_size": 16, "identity": {"base": "pico"}}
    return GrowingSweep(backbone, evaluator, found, out, **options)


def test_grown_statistics_are_those_of_one_evaluation_and_no_image_is_made_twice(files, whole, tmp_path, monkeypatch):
    growing, seeds = sweep(files, whole, tmp_path), range(500, 600)
    seen = []
    plain = PicoBackbone.sample
    monkeypatch.setattr(PicoBackbone, "sample", lambda self, s, *a, **k: seen.extend(s) or plain(self, s, *a, **k))
    at = lambda count: growing.grown("snapshot-000000160", 0.7, seeds, count, contrast=1.2)  # noqa: E731
    first, last = at(30), [at(50), at(100)][-1]
    assert sorted(seen) == list(seeds)
    assert at(30) == first and "is_mean" not in first, "found, not made again"
    assert len(seen) == 100
    direct = growing.measure("snapshot-000000160", 0.7, seeds, contrast=1.2)
    for name in ("fid", "is_mean", "is_std"):
        assert last[name] == pytest.approx(direct[name], rel=1e-9)
    del seen[:]
    few = at(20)
    assert seen == [], "what is kept of 100 images holds the first 20"
    direct = growing.measure("snapshot-000000160", 0.7, seeds[:20], contrast=1.2)
    assert few["fid"] == pytest.approx(direct["fid"], rel=1e-9)


def test_labels_that_hang_on_the_length_of_the_list_are_refused(files, whole, tmp_path):
    class InOrder(SlowPico):
        def assign_labels(self, seeds, **settings):
            return torch.tensor([i * self.num_classes // len(seeds) for i in range(len(seeds))])

    growing = sweep(files, whole, tmp_path, InOrder.load(files / "base.safetensors", CPU))
    with pytest.raises(UserError, match="number of images"):
        growing.grown("base", 0.0, range(100), 20)


def test_image_counts_that_decrease_are_refused_before_anything_is_done(files, tmp_path):
    with pytest.raises(UserError, match="deciding_images"):
        Reproduction(pico_row(files), tmp_path, dataclasses.replace(PLAN, deciding_images=500), CPU)
