"""Further settings of the sampler are searched with w: found, whole where they must be, named on the command line."""

import pytest
from click.testing import CliRunner

from neon_files.errors import UserError
from neon_run import commands
from neon_run.backbones import backbone_of, find_backbones, find_row
from neon_run.reproduce.commands import reproduce_command
from neon_run.row import Range
from neon_run.search import find as found_by
from neon_run.search.axes import chosen_axes
from neon_run.search.find import SearchPlan, find
from neon_run.search.quick import Axis, Budget, search
from neon_run.search.sweep import BASE, early_stopped_grid

W = Axis(0.0, 2.4, 1.0, 0.5)
AXES = {
    "cfg": Axis(1.4, 4.0, 2.6, 0.5),
    "top_p": Axis(0.8, 1.0, 0.9, 0.04),
    "top_k": Axis(100, 900, 500, 100, whole=True),
}
BEST = {"cfg": 3.1, "top_p": 0.96, "top_k": 610}


def valley(w, settings):
    """A bowl in units of the first steps; w and guidance trade off."""
    at = {name: (value - BEST[name]) / AXES[name].step for name, value in settings.items()}
    u = (w - 1.3) / W.step
    return 2 + 0.3 * sum(x * x for x in (u, *at.values())) - 0.4 * u * at.get("cfg", 0.0)


@pytest.mark.parametrize("names", [("cfg", "top_p"), ("top_k",), ("cfg", "top_p", "top_k")])
def test_the_lowest_point_is_found_along_every_axis(names):
    asked = []

    def measure(snapshot, w, settings, count):
        asked.append((w, settings))
        return valley(w, settings)

    found = search(measure, {"a": 1.0}, W, {name: AXES[name] for name in names})
    assert valley(found.best.w, found.best.settings) < 2.03
    assert list(found.best.settings) == list(names)
    assert len({p.place for p in found.points}) <= Budget().settings[len(names)]
    assert all(AXES[name].low <= value <= AXES[name].high for _, settings in asked for name, value in settings.items())
    assert all(type(settings["top_k"]) is int for _, settings in asked if "top_k" in settings)


def test_a_narrow_axis_of_whole_numbers_is_walked_one_by_one_and_no_setting_twice():
    steps = Axis(3, 7, 4, 1, whole=True)
    found = search(lambda s, w, settings, n: (w - 1.3) ** 2 + (settings["n"] - 6) ** 2, {"a": 1.0}, W, {"n": steps})
    ranking = [p.place for p in found.points if p.images == Budget().ranking_images]
    assert found.best.settings == {"n": 6} and abs(found.best.w - 1.3) < 0.2
    assert len(ranking) == len(set(ranking)) == 10


class Measured:
    """A sweep whose distance is known."""

    snapshots = ("snapshot-1",)

    def grown(self, snapshot, w, seeds, count, **settings):
        return {"snapshot": BASE if w == 0 else snapshot, "w": w, "num_images": count, "fid": valley(w, settings)}

    def measure(self, snapshot, w, seeds, **settings):
        return self.grown(snapshot, w, seeds, len(seeds), **settings)


@pytest.mark.parametrize("names", [("cfg",), ("cfg", "top_p"), ("top_k", "cfg", "top_p")])
def test_the_base_is_searched_along_the_same_axes_without_w(names, monkeypatch):
    monkeypatch.setattr(found_by, "step_lengths", lambda sweep, names: {"snapshot-1": 1.0})
    axes = {name: Range(AXES[name].low, AXES[name].high, AXES[name].whole) for name in names}
    row = find_row("var/imagenet_256")
    row = commands.replace(row, axes=axes, evaluate={"cfg": 2.6, "top_p": 0.9, "top_k": 500})
    result = find(row, SearchPlan(), Measured(), range(50_000))
    of_base = result["base_best"]["settings"]
    assert list(of_base) == list(names) == list(result["best"]["settings"])
    lowest = min(p["fid"] for p in result["points"] if p["w"] == 0)
    assert valley(0.0, of_base) == lowest < valley(0.0, {name: AXES[name].start for name in names})
    few = [p for p in result["points"] if p["w"] == 0 and p["num_images"] == 5_000]
    assert len(few) == Budget().settings[len(names) - 1]
    assert all(len({p["settings"][name] for p in few}) >= 3 for name in names)
    assert "top_k" not in names or type(of_base["top_k"]) is int


def test_a_grid_of_two_settings_stops_early_in_each():
    asked = []

    def measure(snapshot, w, settings):
        asked.append(tuple(settings.values()))
        return (settings["a"] - 2) ** 2 + (settings["b"] - 1) ** 2

    best = early_stopped_grid(["s"], [1.0], {"a": [1, 2, 3, 4], "b": [1, 2, 3]}, measure, 0.1)
    assert best == ("s", 1.0, {"a": 2, "b": 1})
    assert asked == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


# The command line


def chosen(row_id, *texts):
    row = find_row(row_id)
    return chosen_axes(row, texts, backbone_of(row).sample)


def test_axes_are_named_with_ranges_or_have_the_rows():
    axes = chosen("var/imagenet_256", "top_k=100:900", "cfg", "top_p=0.8:1")
    assert axes == {"cfg": Range(1.25, 4.0), "top_k": Range(100, 900, whole=True), "top_p": Range(0.8, 1.0)}
    assert next(iter(axes)) == "cfg"  # the row's own first
    assert chosen("edm/cifar10_cond", "num_steps=10:30") == {"num_steps": Range(10, 30, whole=True)}
    assert chosen("edm/digits_guided", "guidance=1:2") == {"guidance": Range(1.0, 2.0)}


@pytest.mark.parametrize(
    ("row", "texts", "message"),
    [
        ("var/imagenet_256", ["topp=0.8:1"], "no such setting of the sampler; var/imagenet_256 has cfg, top_k, top_p"),
        ("edm/cifar10_cond", ["top_p=0.8:1"], "no such setting of the sampler; edm/cifar10_cond has num_steps"),
        ("edm/cifar10_cond", ["rho=5:9"], "edm/cifar10_cond does not set rho, so a search has no place to begin"),
        ("var/imagenet_256", ["top_p=1:0.8"], "the range must ascend, from 1 to more"),
        ("var/imagenet_256", ["top_p=0.8:0.8"], "the range must ascend"),
        ("var/imagenet_256", ["top_k=100.5:900"], "'100.5' is not a valid integer range"),
        ("var/imagenet_256", ["top_k=-5:900"], "-5 is not in the range"),
        ("var/imagenet_256", ["top_p=0.8:1.5"], "1.5 is not in the range"),
        ("var/imagenet_256", ["cfg=1:inf"], "only a setting that is a number"),
        ("var/imagenet_256", ["cfg=1:2:3"], "LOW:HIGH is expected"),
        ("var/imagenet_256", ["cfg=2"], "LOW:HIGH is expected"),
        ("var/imagenet_256", ["top_p"], "var/imagenet_256 has no range for it; write top_p=LOW:HIGH"),
        ("var/imagenet_256", ["cfg", "cfg=1:2"], "cfg is named twice"),
        ("imm/imagenet_256", ["label_rule=0:1"], "label_rule"),
        ("xar/xar_base", ["flow_steps=2:50"], "flow_steps"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_sentence(row, texts, message):
    with pytest.raises(UserError) as refused:
        chosen(row, *texts)
    text = refused.value.message
    assert message in text and "\n" not in text and text.startswith("--")


def test_the_commands_refuse_axes_before_anything_else(tmp_path):
    words = ["var/imagenet_256", "--out", str(tmp_path), "--axis", "nope=1:2"]
    told = CliRunner().invoke(reproduce_command, words)
    assert told.exit_code == 2 and "--axis nope=1:2: no such setting" in told.output
    told = CliRunner().invoke(reproduce_command, [*words[:3], "--axis", "cfg", "--search", "official"])
    assert told.exit_code == 2 and "--search quick" in told.output
    sweep = commands.command("sweep", next(c for c in find_backbones() if c.name == "var"))
    words = ["--snapshots", str(tmp_path), "--out_dir", str(tmp_path), "--axis", "cfg"]
    told = CliRunner().invoke(sweep, words)
    assert told.exit_code == 2 and "--search quick" in told.output
    told = CliRunner().invoke(sweep, [*words[:-1], "top_k=1.5:9", "--search", "quick"])
    assert told.exit_code == 2 and "not a valid integer" in told.output
