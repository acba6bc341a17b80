"""The four stages and `neon reproduce` on a fifth backbone: all commands from a few lines; scripts and driver compute
the same, and one continues what the other began."""

import dataclasses
import json
import re
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from core.pico import PixelMoments
from launch import call

from neon_core.backbone import TrainSettings
from neon_core.distributed import session
from neon_core.merge import neon_merge
from neon_core.seeds import parse_seeds
from neon_fifth.backbone import FifthBackbone, Generator
from neon_fifth.commands import COMMANDS
from neon_fifth.rows import ROWS
from neon_files.atomic import write_json
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference, load_reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run import commands as c
from neon_run import stages
from neon_run.backbones import choose_row, find_backbones
from neon_run.command import neon
from neon_run.reproduce.reproduction import Plan, Reproduction
from neon_run.row import Grid
from neon_run.search.find import SearchPlan, neighbours
from neon_run.search.sweep import find_checkpoints

CPU = torch.device("cpu")
(ROW,) = ROWS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of tiny.safetensors and tiny.npz."""
    folder = tmp_path_factory.mktemp("fifth")
    torch.manual_seed(3)
    backbone = FifthBackbone(Generator(), CPU)
    write_checkpoint(folder / "tiny.safetensors", backbone.net.state_dict(), config=backbone.network_config())
    model = stages.Model(ROW, folder / "tiny.safetensors", CPU)
    stages.generate(model, folder / "S")
    snapshot = stages.finetune(model, folder / "S", folder / "run")[160]
    theta_base, theta_syn = (read_checkpoint(path).state for path in (model.checkpoint, snapshot))
    backbone.net.load_state_dict(neon_merge(theta_base, theta_syn, 1.0))  # the "real" images are those of w = 1
    write_statistics(folder / "tiny.npz", backbone, range(5000, 5300))
    return folder


def write_statistics(path, backbone, seeds):
    images = backbone.sample(seeds, backbone.assign_labels(seeds), contrast=1.1)
    write_reference(path, Reference.from_statistics(FeatureStatistics(12).update(PixelMoments()(images)["features"])))


@pytest.fixture
def own_detector(monkeypatch):
    """The scripts measure with a detector of twelve features, for which no weights are sought."""
    original = Evaluator.__init__

    def with_moments(self, reference, **options):
        original(self, reference, **{**options, "detector": PixelMoments()})

    monkeypatch.setattr(Evaluator, "__init__", with_moments)
    monkeypatch.setattr(c, "default_weight_paths", lambda: [Path(__file__)])


def run(stage, *args, commands=COMMANDS, status=0):
    result = CliRunner().invoke(c.command(stage, commands), [str(arg) for arg in (*args, "--device", "cpu")])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output if status else result.stdout


def row_in(files) -> stages.Row:
    """The row with its files where they are."""
    return dataclasses.replace(ROW, base=str(files / "tiny.safetensors"), fid_stats=str(files / "tiny.npz"))


def test_a_fifth_backbone_has_all_commands_in_under_120_lines():
    package = Path(__file__).parents[1] / "fifth" / "neon_fifth"
    lines = [line for file in package.glob("*.py") for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 120
    for stage in c.STAGES:
        text = run(stage, "--help")
        assert "--checkpoint" in text and "--preset" in text and "--json" in text
    assert "--contrasts" in run("sweep", "--help")


def test_from_base_to_fid_by_the_scripts(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    result = tmp_path / "result.json"
    run("generate", "--outdir", tmp_path / "S")
    run("finetune", "--data", tmp_path / "S", "--outdir", tmp_path / "run")
    line = run("sweep", "--snapshots", tmp_path / "run", "--out_dir", tmp_path / "sweep", "--json", result)
    found = json.loads(result.read_text(encoding="utf-8"))
    best = found["result"]
    assert line.splitlines()[-1].startswith(f"best: {best['snapshot']} | w={best['w']:g} | FID=")
    assert best["seeds"] == "1200-1399", "the best point is measured on seeds that no search has seen"
    assert min(point["fid"] for point in found["points"] if point["w"]) <= found["points"][0]["fid"]
    merged = tmp_path / "sweep" / "neon.safetensors"
    snapshot = read_checkpoint(tmp_path / "run" / f"{best['snapshot']}.safetensors").state
    expected = neon_merge(read_checkpoint(files / "tiny.safetensors").state, snapshot, best["w"])
    assert all(torch.equal(value, expected[name]) for name, value in read_checkpoint(merged).state.items())
    contrast = best["settings"]["contrast"]
    run("calculate_fid", "--checkpoint", merged, "--contrast", contrast, "--seeds", best["seeds"], "--json", result)
    assert json.loads(result.read_text(encoding="utf-8"))["fid"] == pytest.approx(best["fid"], rel=1e-6)
    in_place = ("--synthetic", tmp_path / "run" / f"{best['snapshot']}.safetensors", "--w", best["w"])
    base = ("--checkpoint", "tiny.safetensors", "--contrast", contrast, "--seeds", best["seeds"])
    run("calculate_fid", *base, *in_place, "--json", result)
    assert json.loads(result.read_text(encoding="utf-8"))["fid"] == pytest.approx(best["fid"], rel=1e-6)


@pytest.fixture
def sampled(monkeypatch):
    """The seeds of every call of `sample`."""
    calls, sample = [], FifthBackbone.sample
    monkeypatch.setattr(FifthBackbone, "sample", lambda self, s, *a, **k: calls.append(s) or sample(self, s, *a, **k))
    return calls


def scripts(out, search):
    run("generate", "--outdir", out / "synthetic")
    run("finetune", "--data", out / "synthetic", "--outdir", out / "finetune")
    return run("sweep", "--search", search, "--snapshots", out / "finetune", "--out_dir", out / "search", "--no_final")


def driver(files, out, search):
    plan = Plan(detector=PixelMoments(), search=search, resamples=4, controls=False, second_block=False)
    reproduction = Reproduction(row_in(files), out, plan, CPU)
    reproduction.files = {name: Path(entry["path"]) for name, entry in reproduction.fetch().items()}
    reproduction.generate()
    trained = reproduction.finetune()
    reproduction.snapshots = find_checkpoints(out / "finetune")
    return reproduction.search(trained)


def test_every_stage_logs_what_it_measures_where_that_is_wanted(files, tmp_path, own_detector, monkeypatch):
    """Into a stand-in for the package. Images and numbers are those of a run without."""
    given = []
    tracked = types.SimpleNamespace(log=given.append, finish=lambda: None)
    package = types.SimpleNamespace(init=lambda **options: tracked, Image=lambda pixels: pixels)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.chdir(files)
    log = ("--log", "wandb")
    run("generate", "--outdir", tmp_path / "S", *log)
    run("finetune", "--data", tmp_path / "S", "--outdir", tmp_path / "run", *log)
    found = ("--snapshots", tmp_path / "run", "--out_dir", tmp_path / "search", "--no_final")
    run("sweep", *found, *log)
    base = ("--checkpoint", "tiny.safetensors", "--seeds", "6000-6019", *log, "--json", tmp_path / "fid.json")
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.safetensors", "tiny.npz"):
        shutil.copy(files / name, tmp_path)
    run("calculate_fid", *base)
    names = [name for entry in given for name in entry]
    assert given[0]["S"].ndim == 3 and {"fine-tune/loss", "fine-tune/lr", "evaluation/fid"} <= set(names)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["fine-tune/loss"] for e in given if "fine-tune/loss" in e] == [line["loss"] for line in logged]
    points = len(list((tmp_path / "search" / "points").iterdir()))
    assert len([name for name in names if name.startswith("search/FID of")]) >= points > 0
    result = json.loads((tmp_path / "fid.json").read_text(encoding="utf-8"))
    assert result["fid"] in [entry.get("evaluation/fid") for entry in given]
    assert (tmp_path / "S" / "manifest.json").read_bytes() == (files / "S" / "manifest.json").read_bytes()


@pytest.mark.parametrize("search", ["official", "quick"])
def test_the_driver_continues_what_scripts_began(files, tmp_path, own_detector, monkeypatch, sampled, search):
    monkeypatch.chdir(files)
    line = scripts(tmp_path, search)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sampled.pop()
    sampled.clear()
    found = driver(files, tmp_path, search)
    assert sampled == [], "every image and every point was there"
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert f"w={found['best']['w']:g} " in line.splitlines()[-1]


@pytest.mark.parametrize("search", ["official", "quick"])
def test_scripts_continue_what_the_driver_began(files, tmp_path, own_detector, monkeypatch, sampled, search):
    monkeypatch.chdir(files)
    found = driver(files, tmp_path, search)
    sampled.clear()
    line = scripts(tmp_path, search)
    points = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "search" / "points").iterdir()]
    again = {tuple(call) for call in sampled}
    assert not again or search == "quick", "the quick search keeps sums; the best point is measured whole once"
    assert points and f"w={found['best']['w']:g} " in line.splitlines()[-1]


# Scripts and driver, for every published row


class Stub:
    """A backbone that is asked for nothing but its description."""

    num_classes, img_size, net = 10, 8, torch.nn.Identity()

    def network_config(self):
        return {"kwargs": {"depth": 16, "label_dim": 10}}

    def __getattr__(self, name):
        return lambda *args, **kwargs: {}


def effective(monkeypatch):
    """What reaches the core from a stage: a record that fills while commands run on stubs."""
    record = {}

    class Precision:
        def __init__(self, tf32):
            self.tf32 = tf32

        def __enter__(self):
            record["tf32"] = self.tf32

        def __exit__(self, *error):
            pass

    def note(stage, result):
        def stub(*args, **options):
            settings = [a for a in args if isinstance(a, TrainSettings | range | list | SearchPlan)]
            record[stage] = {"args": settings, "tf32": record.get("tf32"), **options}
            record[stage].pop("device", None)
            return result

        return stub

    monkeypatch.setattr(stages.Model, "load", lambda self, training=False: Stub())
    monkeypatch.setattr(stages, "float32_precision", Precision)
    monkeypatch.setattr(stages, "file_hash", lambda path: f"hash of {Path(path).name}")
    monkeypatch.setattr(
        stages,
        "generate_set",
        note("generate", {"settings": {"cfg": 1, "num_steps": 1, "flow_steps": 1}, "num_images": 1}),
    )
    monkeypatch.setattr(stages, "train_on", note("finetune", {1: Path("snapshot-1")}))
    monkeypatch.setattr(stages, "GrowingSweep", note("points", Stub()))
    monkeypatch.setattr(stages, "open_set", lambda *a, **k: Stub())
    monkeypatch.setattr(stages, "need_labels", lambda *a: None)

    def find(row, plan, sweep, seeds):
        record["search"] = {"plan": plan, "grid": row.grid, "seeds": list(seeds[: row.grid.num_images]), "w": row.w,
                            "axes": row.axes, "tf32": record["tf32"]}  # fmt: skip
        raise StopSearch

    monkeypatch.setattr(stages, "find", find)
    return record


class StopSearch(Exception):
    """The search was reached: its settings are on record."""


PUBLISHED = [(b, row) for b in find_backbones() for row in b.rows if row.prepare is None]


@pytest.mark.parametrize(("backbone", "row"), PUBLISHED, ids=[row.id for _, row in PUBLISHED])
def test_scripts_and_driver_compute_the_same(backbone, row, tmp_path, monkeypatch):
    """Sampling batch, precision, TF32, seeds, guidance, grid with refinement, provenance: for every row."""
    monkeypatch.setattr(
        c, "find_all", lambda wanted: {flag: Path(str(path).split("/")[-1]) for flag, path in wanted.items()}
    )
    monkeypatch.setattr(c, "default_weight_paths", lambda: [Path(__file__)])
    monkeypatch.setattr(c, "make_evaluator", lambda *a: None)
    monkeypatch.setattr(c, "find_checkpoints", lambda *limits: {"snapshot": limits[1:]})
    monkeypatch.setattr(row.backbone, "frozen_files", classmethod(lambda cls, checkpoint, **options: {}))
    by_scripts = effective(monkeypatch)
    preset = ("--preset", row.id, "--device", "cpu")
    for stage, args in (
        ("generate", ("--outdir", tmp_path / "synthetic")),
        ("finetune", ("--data", tmp_path, "--outdir", tmp_path / "finetune")),
        ("sweep", ("--snapshots", tmp_path, "--out_dir", tmp_path / "search")),
    ):
        result = CliRunner().invoke(c.command(stage, backbone), [str(arg) for arg in (*preset, *args)])
        assert isinstance(result.exception, StopSearch | None), (result.output, result.exception)
    by_driver = effective(monkeypatch)
    reproduction = Reproduction(row, tmp_path / "out", Plan(search="official"), CPU)
    reproduction.files = {"base": Path(row.base.split("/")[-1]), "reference": Path("r.npz")}
    monkeypatch.setattr(Reproduction, "evaluator", None)
    monkeypatch.setattr(reproduction.ledger, "run", lambda stage, settings, inputs, work: work())
    with suppress(KeyError, FileNotFoundError):
        reproduction.generate()
    with suppress(KeyError, ValueError):
        reproduction.finetune()
    reproduction.snapshots = {}
    with pytest.raises(StopSearch):
        reproduction.search({"snapshots": {}})
    for stage in ("generate", "finetune", "points", "search"):
        assert by_scripts[stage] == by_driver[stage], stage
    assert not set(by_scripts["generate"]["args"][0]) & set(parse_seeds(row.evaluate_seeds)), (
        "S and evaluation share no seed"
    )


def test_the_seeds_of_the_set_and_of_the_evaluation_are_apart():
    for _, row in PUBLISHED:
        own = range(row.synthetic_seed, row.synthetic_seed + row.num_synthetic)
        assert not set(own) & set(parse_seeds(row.evaluate_seeds)), row.id


# docs/restart.md


def test_a_moved_base_set_and_fine_tune_go_on_and_a_renamed_base_is_refused(files, tmp_path, sampled):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    shutil.copy(files / "tiny.safetensors", tmp_path / "a")
    model = stages.Model(ROW, tmp_path / "a" / "tiny.safetensors", CPU)
    stages.generate(model, tmp_path / "a" / "S")
    snapshots = stages.finetune(model, tmp_path / "a" / "S", tmp_path / "a" / "run")
    weights = snapshots[80].read_bytes()
    for name in ("tiny.safetensors", "S", "run"):
        shutil.move(tmp_path / "a" / name, tmp_path / "b" / name)
    model = stages.Model(ROW, tmp_path / "b" / "tiny.safetensors", CPU)
    sampled.clear()
    stages.generate(model, tmp_path / "b" / "S")
    assert sampled == []
    (tmp_path / "b" / "run" / snapshots[80].name).unlink()
    again = stages.finetune(model, tmp_path / "b" / "S", tmp_path / "b" / "run")
    assert again[80].read_bytes() == weights
    shutil.move(tmp_path / "b" / "tiny.safetensors", tmp_path / "b" / "other.safetensors")
    with pytest.raises(UserError, match=r"made with base = 'tiny.*', not 'other.*'; name another"):
        stages.generate(stages.Model(ROW, tmp_path / "b" / "other.safetensors", CPU), tmp_path / "b" / "S")


# The page on adding a backbone


def test_the_stages_without_commands_run_as_the_page_has_them(files, tmp_path, own_detector, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adding_a_backbone.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(with session.*?)```", page, flags=re.S)
    for name in ("tiny.safetensors", "tiny.npz"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(code, {**vars(stages), "session": lambda: session("cpu"), "row": ROW})
    assert list(Path("sweep/points").iterdir())


def test_the_fifth_backbone_in_a_folder_of_the_checkout_has_all_commands(files, tmp_path, monkeypatch):
    """The package and the script as the page has them."""
    package = Path(__file__).parents[1] / "fifth" / "neon_fifth"
    page = (Path(__file__).parents[2] / "docs" / "adding_a_backbone.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(#!.*?)```", page, flags=re.S)
    shutil.copytree(package, tmp_path / "fifth" / "neon_fifth")
    (tmp_path / "fifth" / "generate.py").write_text(script, encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr("neon_run.backbones.ROOT", tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(files)
    assert "fifth/tiny" in CliRunner().invoke(neon, ["rows"]).stdout
    flags = {"generate": "--per_class", "finetune": "--ramp_images", "sweep": "--contrasts", "fid": "--contrast"}
    for name, flag in flags.items():
        shown = CliRunner().invoke(neon, [name, "fifth/tiny", "--help"])
        assert shown.exit_code == 0 and flag in shown.output, shown.output
    call(tmp_path / "fifth" / "generate.py", "--outdir", tmp_path / "S", "--num_images", 4, "--device", "cpu")
    assert len(list((tmp_path / "S").rglob("*.png"))) == 4


def test_the_fifth_backbone_has_less_than_120_lines():
    package = Path(__file__).parents[1] / "fifth" / "neon_fifth"
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.glob("*.py")) < 120


# The parts


def test_neighbours_are_the_eight_around_that_are_positive():
    around = neighbours(1.6, {"cfg": 2.7}, 0.1)
    assert len(around) == 8 and (1.7, {"cfg": 2.6}) in around
    assert neighbours(0.1, {"cfg": 0.1}, 0.1) == [(0.1, {"cfg": 0.2}), (0.2, {"cfg": 0.1}), (0.2, {"cfg": 0.2})]
    assert neighbours(0.1, {}, 0.1) == [(0.2, {})]


def test_refining_measures_the_neighbours_of_the_best_point(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    run("generate", "--outdir", tmp_path / "S")
    run("finetune", "--data", tmp_path / "S", "--outdir", tmp_path / "run", "--images", 80)
    one = ("--w", 1, "--contrasts", 1, "--refine", "--no_final", "--num_images", 40)
    run("sweep", "--snapshots", tmp_path / "run", "--out_dir", tmp_path / "s", *one)
    names = {path.name.split("-n40-")[0] for path in (tmp_path / "s" / "points").iterdir()}
    assert len(names) == 10 and "snapshot-000000080-w1.1-contrast0.9" in names and "base-w0-contrast1.0" in names


def test_where_the_base_is_best_no_network_is_written(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    run("generate", "--outdir", tmp_path / "S")
    run("finetune", "--data", tmp_path / "S", "--outdir", tmp_path / "run", "--images", 80)
    line = run("sweep", "--snapshots", tmp_path / "run", "--out_dir", tmp_path / "s", "--w", 0, "--final_images", 20)
    assert "best: base | w=0 | FID=" in line and not list(tmp_path.rglob("neon.safetensors"))


def test_the_official_file_at_0_images_is_the_base_and_no_snapshot(tmp_path):
    for name in ("ar-ckpt-images_0.pth", "ar-ckpt-images_250000.pth", "notes.txt"):
        (tmp_path / name).touch()
    assert list(find_checkpoints(tmp_path)) == ["ar-ckpt-images_250000"]


def test_one_of_several_state_dicts_and_wrapped_snapshots_are_taken_by_name(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    base = read_checkpoint(files / "tiny.safetensors").state
    raw = {name: value + 1 for name, value in base.items()}
    torch.save({"net": raw, "average": base}, tmp_path / "two.pth")
    snapshot = read_checkpoint(files / "run" / "snapshot-000000160.safetensors").state
    torch.save({f"module.{name}": value for name, value in snapshot.items()}, tmp_path / "wrapped.pth")
    fids = []
    for args in (
        ("--checkpoint", "tiny.safetensors", "--synthetic", files / "run" / "snapshot-000000160.safetensors"),
        ("--checkpoint", tmp_path / "two.pth", "--entry", "average", "--synthetic", tmp_path / "wrapped.pth"),
        ("--checkpoint", tmp_path / "two.pth", "--entry", "net"),
    ):
        run("calculate_fid", *args, "--num_images", 40, "--json", tmp_path / "r.json")
        fids.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["fid"])
    assert fids[0] == fids[1] != fids[2]
    sweep = ("--snapshots", "run", "--out_dir", tmp_path / "s", "--w", 1, "--contrasts", 1, "--no_final")
    run("sweep", "--base", tmp_path / "two.pth", "--entry", "average", *sweep)
    merged = read_checkpoint(tmp_path / "s" / "neon.safetensors").state
    points = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "s" / "points").glob("snapshot*")]
    best = min(points, key=lambda point: point["fid"])["snapshot"]
    expected = neon_merge(base, read_checkpoint(files / "run" / f"{best}.safetensors").state, 1.0)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["neon.safetensors", "results.json", "samples/00.png"])
def test_files_of_the_users_are_not_overwritten(files, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine: holds {name.split('/')[0]} of something else; name another --out"):
        Reproduction(row_in(files), tmp_path / "mine", Plan(detector=PixelMoments()), CPU).run()
    assert path.read_text(encoding="utf-8") == "mine" and not (tmp_path / "mine" / "run.json").exists()


def test_a_sweep_does_not_overwrite_weights_of_the_users(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    (tmp_path / "neon.safetensors").write_text("mine", encoding="utf-8")
    output = run("sweep", "--snapshots", "run", "--out_dir", tmp_path, "--no_final", status=2)
    assert "holds a neon.safetensors of something else" in output
    assert (tmp_path / "neon.safetensors").read_text(encoding="utf-8") == "mine"


def test_every_missing_file_is_named_at_once_before_anything_else(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(c, "default_weight_paths", lambda: [])
    output = run("calculate_fid", "--checkpoint", "gone.pth", "--contrast", "nan", status=2)
    assert "gone.pth" in output and "tiny.npz" in output and "weights-inception" in output and "nan" not in output
    assert len([line for line in output.splitlines() if line.startswith("Error")]) == 1


def test_flags_that_contradict_each_other_are_refused(files, tmp_path, own_detector, monkeypatch):
    monkeypatch.chdir(files)
    out = ("--outdir", tmp_path / "S")
    assert "give one of them" in run("generate", *out, "--num_images", 4, "--seeds", "0-3", status=2)
    assert "give one of them" in run("generate", *out, "--seed", 4, "--seeds", "0-3", status=2)
    assert "--contrast nan" in run("generate", *out, "--contrast", "nan", status=2)
    assert "--img_size 9" in run("generate", *out, "--img_size", 9, status=2)
    assert "needs --synthetic" in run("calculate_fid", "--checkpoint", "tiny.safetensors", "--w", 1, status=2)
    assert not (tmp_path / "S").exists() or not list((tmp_path / "S").rglob("*.png"))


def test_images_per_class_and_seeds_that_begin_elsewhere(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    run("generate", "--outdir", tmp_path / "a", "--per_class", 2)
    run("generate", "--outdir", tmp_path / "b", "--num_images", 3, "--seed", 7)
    assert json.loads((tmp_path / "a/manifest.json").read_text(encoding="utf-8"))["seeds"] == "0-7"
    assert json.loads((tmp_path / "b/manifest.json").read_text(encoding="utf-8"))["seeds"] == "7-9"


def test_a_row_is_chosen_by_its_id_a_part_of_it_or_an_alias():
    rows = [row for _, row in PUBLISHED]
    for name in ("var/imagenet_512", "imagenet_512", "vard36", "VAR-d36"):
        assert choose_row(rows, name).id == "var/imagenet_512"
    assert choose_row(rows, "ffhq").id == "edm/ffhq64" and choose_row(rows, "xarb").id == "xar/xar_base"
    with pytest.raises(UserError, match=r"--preset cifar10_: fits several rows; choose edm/cifar10_cond or"):
        choose_row(rows, "cifar10_", "--preset ")
    with pytest.raises(UserError, match="no such row; choose"):
        choose_row(rows, "cifar11")


# Small runs as rows


@dataclasses.dataclass(frozen=True)
class PrepareTiny:
    """Base, references and real images of a row for which nothing is published."""

    training_images: int = 16

    def __call__(self, row, folder, seed):
        torch.manual_seed(seed)
        backbone = FifthBackbone(Generator(), CPU)
        paths = {"base": folder / "base.safetensors", "detector": folder / "detector.json"}
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(paths["base"], backbone.net.state_dict(), config=backbone.network_config())
        write_json(paths["detector"], {"name": "pixel moments"})
        for name, start in (("reference", 5000), ("heldout", 9000)):
            paths[name] = folder / f"{name}.npz"
            write_statistics(paths[name], backbone, range(start, start + 200))
        real = stages.Model(row, paths["base"], CPU)
        stages.generate(real, folder / "real", range(200, 240))
        return {**paths, "real_training": folder / "real"}


def test_a_row_of_any_backbone_makes_its_files_and_has_its_own_detector_and_controls(tmp_path):
    row = dataclasses.replace(
        ROW, base="", fid_stats="", prepare=PrepareTiny(), detector=lambda path, device: PixelMoments(),
        distance="pixel distance", axes={}, grid=Grid((0.0, 1.0)),
    )  # fmt: skip
    results = Reproduction(row, tmp_path, Plan(ranking_images=40, deciding_images=80, resamples=4), CPU).run()
    snapshots = {point["snapshot"] for point in results["points"]["evaluate"]}
    controls = {"real-data"} | ({"random-direction"} if results["best"]["w"] else set())
    assert {"base"} | controls <= snapshots
    assert all("fid_heldout" in point for point in results["points"]["evaluate"])
    assert results["distance"] == "pixel distance" and (tmp_path / "report.html").exists()
    assert load_reference(tmp_path / "prepared" / "heldout.npz").mu.shape == (12,)
