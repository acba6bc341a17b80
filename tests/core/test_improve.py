"""`improve`: five lines for any module; its effect, kill and resume, ranks, and what it says of what it cannot use."""

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from core.discs import DETECTOR, QUICK, Flow, discs, loss, sample, trained
from launch import ROOT, launch
from torch import nn

from neon_core.merge import neon_merge
from neon_core.seeds import PerImageRandom
from neon_core.synthetic import write_png
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_metrics.reference import Reference, write_reference
from neon_metrics.statistics import FeatureStatistics
from neon_run import improve
from neon_run.improvement import Result
from neon_run.own_generator import fingerprint


@pytest.fixture(scope="module")
def net():
    """Trained for some seconds; docs/improve.md has longer trainings."""
    return trained(seed=0, steps=2500)


def write_statistics(path, images):
    write_reference(path, Reference.from_statistics(FeatureStatistics(64).update(DETECTOR(images)["features"])))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Reference statistics of 10,000 discs that no network was trained on."""
    images = discs(10_000, torch.Generator().manual_seed(99))
    return write_statistics(tmp_path_factory.mktemp("real") / "real.npz", images)


@pytest.fixture(scope="module")
def quick(net, real, tmp_path_factory):
    """(folder, result) of a small run that nothing stopped."""
    out = tmp_path_factory.mktemp("quick")
    return out, improve(net, sample=sample, loss=loss, real=real, detector=DETECTOR, out=out, **QUICK)


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_neon_helps_a_flow_matching_network(net, real, tmp_path):
    before = state_of(net)
    options = {"images": 4000, "ranking_images": 2000, "sample_batch_size": 500}
    result = improve(net, sample=sample, loss=loss, real=real, detector=DETECTOR, out=tmp_path, **options)
    assert result.improved and 0.5 < result.w < 1.6, "the distance travelled puts the best w near 1"
    assert result.neon < 0.85 * result.base
    points = {(p["snapshot"][:6], p["w"]): p["fid"] for p in result.details["points"]["evaluate"]}
    assert points["snapsh", -1.0] > 1.2 * result.base and points["random", result.w] > 0.95 * result.base
    (snapshot,) = (tmp_path / "finetune").glob("snapshot-*.safetensors")
    expected = neon_merge(before, read_checkpoint(snapshot).state, result.w)
    assert all(torch.equal(v, expected[name]) for name, v in read_checkpoint(result.checkpoint).state.items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "net stays the base"
    assert {parameter.requires_grad for parameter in net.parameters()} == {True}
    assert "random direction" in result.report.read_text(encoding="utf-8") and (tmp_path / "results.json").exists()
    assert "Neon is better" in str(result)


class Stop(Exception):
    pass


class StopsAt:
    """`sample`, which fails in the call after `calls`; counts the seeds of all others."""

    def __init__(self, calls=None):
        self.calls, self.count, self.seeds = calls, 0, []

    def __call__(self, net, seeds, labels):
        if self.count == self.calls:
            raise Stop
        self.count += 1
        self.seeds += seeds if self.count > 3 else []  # the first three calls are checks
        return sample(net, seeds, labels)


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(net, real, quick, tmp_path):
    options = {"loss": loss, "real": real, "detector": DETECTOR, "out": tmp_path, **QUICK}
    unbroken = StopsAt()
    improve(net, sample=unbroken, **{**options, "out": tmp_path / "whole"})
    checks, stops = 3, [StopsAt(5), StopsAt(7), StopsAt(9), StopsAt(15)]  # in S, the search, the evaluation
    for stopping in stops:
        with pytest.raises(Stop):
            improve(net, sample=stopping, **{**options, "out": tmp_path / "broken"})
    last = StopsAt()
    result = improve(net, sample=last, **{**options, "out": tmp_path / "broken"})
    made = [seed for calls in (*stops, last) for seed in calls.seeds]
    assert sorted(seed for seed in made if seed < 256) == list(range(256)), "no image of S was made twice"
    assert len(made) - len(unbroken.seeds) <= 3 * 64 * len(stops), "nor more than the batches of one point at each stop"
    assert (result.w, result.base, result.neon) == (quick[1].w, quick[1].base, quick[1].neon)
    assert (tmp_path / "broken/neon.safetensors").read_bytes() == (quick[0] / "neon.safetensors").read_bytes()
    again = StopsAt()
    assert improve(net, sample=again, **{**options, "out": tmp_path / "broken"}).neon == result.neon
    assert again.count == checks, "a finished run samples nothing but what is checked at the start"


def test_two_ranks_give_what_one_gives(net, real, quick, tmp_path):
    write_checkpoint(tmp_path / "base.safetensors", net.state_dict())
    done = launch("tests/core/discs.py", tmp_path / "base.safetensors", real, tmp_path / "out", ranks=2)
    assert done.returncode == 0, done.stderr
    images = {path.name: path.read_bytes() for path in (quick[0] / "synthetic").rglob("*.png")}
    assert images == {path.name: path.read_bytes() for path in (tmp_path / "out" / "synthetic").rglob("*.png")}
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["best"]["w"] == pytest.approx(quick[1].details["best"]["w"], rel=1e-4)
    assert results["second_block"]["neon"]["fid"] == pytest.approx(quick[1].neon, rel=1e-3)


def test_where_the_base_wins_it_is_kept_and_that_is_said(net, tmp_path, capsys):
    own = torch.cat([sample(net, range(start, start + 500), None).detach() for start in range(5000, 9000, 500)])
    reference = write_statistics(tmp_path / "own.npz", own)
    fresh, before = Flow(), state_of(net)
    fresh.load_state_dict(before)
    result = improve(
        fresh,
        sample=sample,
        loss=loss,
        real=reference,
        detector=DETECTOR,
        out=tmp_path / "out",
        update_net=True,
        **QUICK,
    )
    assert not result.improved and result.w == 0 and result.checkpoint == tmp_path / "out" / "base.safetensors"
    assert all(torch.equal(v, before[name]) for name, v in read_checkpoint(result.checkpoint).state.items())
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert "the base is kept" in capsys.readouterr().out


# A score of one's own, and samples that are no pictures


class Points(nn.Module):
    """noise [B, 2], class [B] of two -> a point in the plane."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.place, self.frozen = nn.Embedding(2, 2), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, noise, labels):
        return self.frozen(noise) + self.place(labels)


def points(net, seeds, labels):
    return net(PerImageRandom(seeds).randn(2), labels).double()


def points_loss(net, images, labels, generator):
    assert images.shape[1:] == (2,) and images.dtype == torch.float32
    return (net(torch.zeros_like(images), labels) - images - 1).square().mean()


def off_target(images):
    """The self-trained points drift to (1, 1) from where they are; wanted is the other direction."""
    assert images.dtype == torch.float32 and not images.is_cuda
    return (images.mean(0) + 0.05).square().sum().item() ** 0.5


def test_a_score_of_any_samples_with_classes(tmp_path):
    net = Points()
    with torch.no_grad():
        net.place.weight.sub_(net.place.weight.mean(0))
        net.frozen.bias.zero_()
    frozen = net.frozen.weight.clone()
    out = tmp_path / "out"
    result = improve(
        net, sample=points, loss=points_loss, score=off_target, num_classes=2, out=out, update_net=True, **QUICK
    )
    assert len(list((out / "synthetic").rglob("*_label1.npy"))) == 128
    assert result.improved and result.neon < result.base and result.standard_error > 0
    assert torch.equal(net.frozen.weight, frozen), "what was frozen stays so"
    assert torch.equal(net.place.weight, read_checkpoint(result.checkpoint).state["place.weight"])
    assert not (net.place.weight == read_checkpoint(out / "base.safetensors").state["place.weight"]).all()
    assert "score" in result.report.read_text(encoding="utf-8")


class Odd(nn.Module):
    """Tied weights, running statistics, a mask, a reparametrization, dropout, and a layer that the loss leaves out."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.first, self.second, self.left_out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.1)
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, z):
        return self.last(self.dropout(self.norm(self.second(torch.tanh(self.first(z))))))


def points_of(net, seeds, labels):
    return net(PerImageRandom(seeds).randn(4))


def far_loss(net, x, labels, generator):
    return (net(torch.randn(x.shape, generator=generator)) - x - 0.1).square().mean()


def spread(images):
    return images.square().mean().item()


def test_odd_modules_an_average_and_half_precision(tmp_path, capsys):
    net = Odd()
    given = {"sample": points_of, "loss": far_loss, "score": spread, **QUICK}
    result = improve(net, out=tmp_path, ema=0.9, precision="bf16", lr=1e-4, **given)
    settings = result.details["provenance"]["train"]
    assert settings["precision"] == "bf16" and settings["ema"]["decay"] == 0.9 and settings["lr"] == 1e-4
    written, before = read_checkpoint(tmp_path / "neon.safetensors").state, state_of(net)
    assert written.keys() == before.keys()
    for name in ("mask", "left_out.weight", "norm.running_mean"):
        assert torch.equal(written[name], before[name]), name
    assert torch.equal(written["first.weight"], written["second.weight"])
    improve(net, out=tmp_path / "far", lr=0.05, **given)
    assert "too few to average; lower lr=" in capsys.readouterr().err


# What cannot be used, in one sentence


def no_function_of_seeds(net, seeds, labels):
    return (255 * torch.rand(len(seeds), 1, 8, 8)).to(torch.uint8)


def one_seed_per_batch(net, seeds, labels):
    return (255 * torch.rand(len(seeds), 1, 8, 8, generator=torch.Generator().manual_seed(seeds[0]))).to(torch.uint8)


FLOAT = {"sample": lambda net, seeds, labels: PerImageRandom(seeds).randn(3), "real": None}
BAD = {
    "no trainable parameters": {"net": Flow().requires_grad_(False)},
    "give either real= .* or score=": {"score": lambda images: 0.0},
    "two calls with the same seeds give different images": {"sample": no_function_of_seeds},
    "changes with the other seeds of its batch": {"sample": one_seed_per_batch},
    r"gives \[1, 8, 8\] for 4 seeds": {"sample": lambda *given: sample(*given)[0]},
    "gives a list; a tensor": {"sample": lambda *given: list(sample(*given))},
    "gives torch.int64; uint8 .* or floats": {"sample": lambda *given: sample(*given).long()},
    "pixels that are not finite": {"sample": lambda *given: sample(*given).float() / 0 * 0},
    r"uint8 images \[B, 3 or 1, H, H\]": {"sample": lambda *given: sample(*given).float()},
    r"loss: gives a tensor \[4\]; a scalar": {"loss": lambda net, images, *_: images.float().mean((1, 2, 3))},
    "loss: gives a float; a scalar": {"loss": lambda *given: loss(*given).item()},
    "loss: does not depend on the trainable": {"loss": lambda *given: loss(*given).detach()},
    "loss: is nan for samples of the net": {"loss": lambda *given: loss(*given) * float("nan")},
    "score: is nan for the 256 images": {**FLOAT, "score": lambda images: float("nan"),
                                         "loss": lambda net, x, _, g: net.net[-1].bias.sum() + x.sum()},
    "gone.npz: does not exist": {"real": "gone.npz"},
    "gone: no such folder": {"real": "gone"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_used_is_one_sentence(message, net, real, tmp_path):
    given = {"net": net, "sample": sample, "loss": loss, "real": real, "detector": DETECTOR, **BAD[message]}
    with pytest.raises(UserError, match=message) as error:
        improve(given.pop("net"), out=tmp_path / "out", **given, **QUICK)
    assert "\n" not in error.value.message
    assert not (tmp_path / "out" / "finetune").exists()


def write_images(folder, images):
    for number, image in enumerate(images):
        write_png(folder / f"{number:03d}.png", image)
    return folder


def test_real_images_that_are_too_few_or_of_another_size_are_refused(net, tmp_path):
    few = write_images(tmp_path / "few", discs(64, torch.Generator().manual_seed(1)))
    large = write_images(tmp_path / "large", torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    options = {"sample": sample, "loss": loss, "detector": DETECTOR, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"few: 64 images are too few for a covariance of 64 features \(pixels\)"):
        improve(net, real=few, **options)
    with pytest.raises(UserError, match=r"large: its images are 1 x 16 x 16, those of sample 1 x 8 x 8"):
        improve(net, real=large, **options)


def test_a_folder_of_real_images_gives_the_reference(net, tmp_path):
    images = discs(80, torch.Generator().manual_seed(1))
    folder, out = write_images(tmp_path / "real", images), tmp_path / "out"
    result = improve(net, sample=sample, loss=loss, real=folder, detector=DETECTOR, out=out, **QUICK)
    (path,) = out.glob("reference-*.npz")
    expected = write_statistics(tmp_path / "expected.npz", images)
    assert result.details["provenance"]["files"]["reference"]["path"] == str(path.resolve())
    for name in ("mu", "sigma"):
        torch.testing.assert_close(*(torch.from_numpy(np.load(p)[name]) for p in (path, expected)))


@pytest.mark.parametrize("other", ["net", "loss", "sample"])
def test_a_folder_with_the_run_of_something_else_is_refused(other, net, real, quick, tmp_path):
    changed = {
        "net": Flow(),
        "loss": lambda net, images, labels, generator: 2 * loss(net, images, labels, generator),
        "sample": lambda net, seeds, labels: 255 - sample(net, seeds, labels),
    }[other]
    given = {"net": net, "sample": sample, "loss": loss, other: changed}
    with pytest.raises(UserError, match=f"holds a run with another {other}"):
        improve(given.pop("net"), **given, real=real, detector=DETECTOR, out=quick[0], **QUICK)


def test_a_fingerprint_changes_with_the_code_alone():
    def make(text):
        names = {}
        exec(text, names)
        return names["f"]

    one = make("def f(x):\n    return [i + 1 for i in x]")
    assert fingerprint(one) == fingerprint(make("\n\ndef f(x):\n    # why\n    return [i + 1 for i in x]"))
    assert fingerprint(one) != fingerprint(make("def f(x):\n    return [i + 2 for i in x]"))
    assert fingerprint(partial(sample, steps=10)) == fingerprint(partial(sample, steps=10))
    assert len({fingerprint(f) for f in (sample, partial(sample, steps=10), partial(sample, steps=50))}) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/improve.md"])
def test_the_lines_of_the_pages_are_a_call_that_can_be_made(page):
    (code,) = re.findall(
        r"```python\n(from neon_run import improve.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S
    )
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.keywords]
    inspect.signature(improve).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    attributes = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert attributes <= {field.name for field in dataclasses.fields(Result)}


def test_the_package_alone_imports_no_torch():
    code = "import sys, neon_run; assert 'torch' not in sys.modules; from neon_run import improve; improve.__call__"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
