"""`neon compare`: runs on one page, and which of them may be compared."""

import json
import re

import pytest
from click.testing import CliRunner

from neon_files.errors import UserError
from neon_files.run_files import write_record
from neon_run.command import neon
from neon_run.reproduce import commands
from neon_run.reproduce.compare import read_runs, view, write_comparison
from neon_run.row import Row


def interval(value, error=0.01):
    return {"value": value, "standard_error": error, "low": value - 1.96 * error, "high": value + 1.96 * error}


def write_run(folder, base, neon, *, row="edm/x", reference="aa" * 32, seeds="0-99", w=1.0, lr=0.1):
    results = {
        "row": row,
        "distance": "FID",
        "best": {"w": w, "settings": {}, "snapshot": "snapshot-1"},
        "base_best": {"settings": {}},
        "points": {"evaluate": []},
        "intervals": {"base": interval(base), "neon": interval(neon), "gain": interval(base - neon)},
        "final": {"neon": {"seeds": seeds}},
        "provenance": {
            "files": {"reference": {"path": "r.npz", "sha256": reference}},
            "generate": {"count": 10},
            "train": {"lr": lr, "betas": [0.9, 0.99]},
            "evaluate": {},
            "versions": {"torch": "2"},
        },
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_seeds_of_one_row_have_a_mean_and_a_standard_deviation(tmp_path):
    runs = [write_run(tmp_path / f"seed-{i}", 4.0, 4.0 - gain, w=w) for i, (gain, w) in enumerate([(1, 1), (2, 1.5)])]
    lines = write_comparison(runs, tmp_path / "page.html")
    assert lines[0].startswith("seed-0 | edm/x | 4.0000 ± 0.0196 | 3.0000 ± 0.0196 | 1.0000 ± 0.0196 | 25.0 | 1 |")
    text = (tmp_path / "page.html").read_text(encoding="utf-8").replace("±\u00a0", "± ")
    assert "1.5000 ± 0.7071" in text and "37.5 ± 17.7" in text and "1.25 ± 0.3536" in text
    assert "http" not in text and text.count("<svg") == 1 and "the settings of all runs are equal" in text
    assert set(re.findall(r'<li><a href="#([\w-]+)"', text)) == set(re.findall(r'<section id="([\w-]+)"', text))
    used = set(re.findall(r'class="term" href="#([\w-]+)"', text))
    assert "term-w" in used and used == set(re.findall(r'<div id="(term-[\w-]+)"', text))


def test_runs_of_one_name_are_told_apart_by_the_ends_of_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"{row}/seed-{i}", 4.0, 3.0) for row in "ab" for i in (0, 1)]
    names = ["a/seed-0", "a/seed-1", "b/seed-0", "b/seed-1"]
    assert [run.name for run in read_runs([runs[0].relative_to(tmp_path), *runs[1:]])] == names
    assert [run.name for run in read_runs(runs[:2])] == ["seed-0", "seed-1"]


def test_settings_of_many_runs_stand_one_below_the_other_at_every_width(tmp_path):
    """A column for each would be wider than the page."""
    runs = [write_run(tmp_path / f"run-{i}", 4.0, 3.0, lr=0.1 * i) for i in range(8)]
    for count, kind in ((3, "values"), (5, "values many"), (8, "values most")):
        write_comparison(runs[:count], tmp_path / "page.html")
        assert f'<table class="{kind}"><thead>' in (tmp_path / "page.html").read_text(encoding="utf-8"), count


def test_a_run_from_before_the_settings_had_names_is_read_like_a_new_one(tmp_path):
    new, old = write_run(tmp_path / "new", 4.0, 3.0), write_run(tmp_path / "old", 4.0, 3.0)
    results = json.loads((old / "results.json").read_text(encoding="utf-8"))
    for folder, best, of_base in (
        (new, {"settings": {"cfg": 2.5}}, {"settings": {"cfg": 2.0}}),
        (old, {"guidance": 2.5}, {"guidance": 2.0}),
    ):
        points = [
            {"snapshot": s, "w": w, "num_images": 9, "fid": 4.0 - w, "block": "second", **end}
            for s, w, end in (("base", 0.0, of_base), ("snapshot-1", -1.0, best), ("snapshot-1", 1.0, best))
        ]
        told = {**results, "best": {"w": 1.0, "snapshot": "snapshot-1", **best}, "base_best": of_base}
        told |= {"points": {"evaluate": points}, **({"guidance": "cfg"} if folder == old else {})}
        (folder / "results.json").write_text(json.dumps(told), encoding="utf-8")
    shown = view(read_runs([new, old]))
    (group,), (verdict,) = shown["groups"], shown["verdicts"]
    assert group["rows"][0][1:] == group["rows"][1][1:] and "cfg 2.5" in group["rows"][0]
    assert verdict["rows"][0][1:] == verdict["rows"][1][1:] == ["4.0000", "5.0000", "3.0000"]


@pytest.mark.parametrize("other", [{"reference": "bb" * 32}, {"seeds": "0-49"}])
def test_what_cannot_be_compared_stands_in_groups_of_its_own(tmp_path, other):
    runs = [write_run(tmp_path / "a", 4.0, 3.0), write_run(tmp_path / "b", 4.0, 3.0, **other)]
    shown = view(read_runs(runs))
    assert [len(group["rows"]) for group in shown["groups"]] == [1, 1]
    assert [group["title"][:9] for group in shown["groups"]] == ["a: FID of", "b: FID of"]
    assert all(not group["several"] for group in shown["groups"])


def test_rows_share_a_group_without_a_mean_and_settings_that_differ_are_listed(tmp_path):
    runs = [write_run(tmp_path / "a", 4.0, 3.0), write_run(tmp_path / "b", 2.0, 1.0, row="edm/y", lr=0.2)]
    shown = view(read_runs(runs))
    assert len(shown["groups"][0]["rows"]) == 2 and not shown["groups"][0]["several"]
    assert shown["differing"] == {"head": ["setting", "a", "b"], "rows": [["train.lr", "0.1", "0.2"]]}


def test_two_different_finished_runs_are_needed(tmp_path):
    run = write_run(tmp_path / "a", 4.0, 3.0)
    for runs in ([run], [run, tmp_path / "a"], []):
        with pytest.raises(UserError, match="name two or more different runs"):
            read_runs(runs)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"b: holds no results\.json; name the --out folder of a finished run"):
        read_runs([run, tmp_path / "b"])
    (tmp_path / "b" / "results.json").write_text('{"row": 3}', encoding="utf-8")
    result = CliRunner().invoke(neon, ["compare", str(run), str(tmp_path / "b"), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 2 and "row is missing or of another type" in result.output
    assert not (tmp_path / "c.html").exists()


def test_repeated_runs_share_no_seed_and_end_in_one_page(tmp_path, monkeypatch, capsys):
    row = Row(id="x/one", backbone=None, num_synthetic=100, generate={}, train=None, w=1.0, evaluate={})
    seen = []

    def finished(row, folder, plan, device):
        seen.append((folder.name, plan.seed, row.synthetic_seed, row.evaluate_seeds))
        write_run(folder, 2.0 + len(seen), 1.0)

    monkeypatch.setattr(commands, "find_row", lambda name: row)
    monkeypatch.setattr(commands, "_reproduce", finished)
    commands.reproduce_command.main(["x/one", "--out", str(tmp_path / "runs"), "--repeat", "2", "--seed", "4",
                                     "--device", "cpu"], standalone_mode=False)  # fmt: skip
    assert seen == [("seed-4", 4, 0, "1000000-1049999"), ("seed-5", 5, 10_000_000, "11000000-11049999")]
    assert "seed-5" in (tmp_path / "runs/compare.html").read_text(encoding="utf-8")
    assert "run 2 of 2" in capsys.readouterr().out


def test_runs_of_a_row_are_judged_together_though_each_has_a_reference_of_its_own(tmp_path):
    for number, reference in enumerate(("aa" * 32, "bb" * 32)):
        folder = tmp_path / f"seed-{number}"
        write_run(folder, 2.0, 1.0, reference=reference)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        places = [("base", 0.0, 2.0), ("snapshot-1", 1.0, 1.0 + number / 10), ("snapshot-1", -1.0, 3.0),
                  ("random-direction", 1.0, 1.8), ("real-data", 1.0, 2.1)]  # fmt: skip
        results["points"]["evaluate"] = [
            {"snapshot": s, "w": w, "settings": {}, "num_images": 100, "fid": fid, "block": "second"}
            for s, w, fid in places
        ]
        results["acceptance"] = {"neon": 0.52, "self_trained": 1.2, "controls": 0.9}
        write_record(folder / "results.json", results)
    lines = write_comparison([tmp_path / "seed-0", tmp_path / "seed-1"], tmp_path / "page.html")
    assert "seed-1: Neon: 0.550 of the base, claimed at most 0.52" in lines
    assert any(line.startswith("edm/x: Neon beats the base") and "47.5 % lower" in line for line in lines)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("claimed at most 0.52") == 1
