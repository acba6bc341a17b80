"""`neon diagnose`: what the gradients on real images and on S say, how sure that is, and what they do not say.

The network is a denoiser of one gain per pixel, D(y) = a y at noise level 1, whose loss and samples are known: trained
on data of variance v its gain is v / (v + 1), and its sampler draws with `shrink` times the deviation that this means.
"""

import json
import math

import numpy as np
import pytest
import torch
from core.pico_rows import PLAN, make_files, pico_row
from torch import nn

from neon_core.backbone import Backbone, TrainSettings
from neon_core.seeds import PerImageRandom
from neon_core.synthetic import generate_set, write_images
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_run import diagnose_command
from neon_run.command import neon
from neon_run.diagnose import PREDICTS, Amount, Gradient, Probe, diagnose, summary
from neon_run.reproduce.reproduction import Reproduction
from neon_run.row import Row
from neon_run.stages import Model

CPU = torch.device("cpu")
UNIT = 20.0  # grey levels


class Gains(nn.Module):
    def __init__(self, variance: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((1, 4, 4), variance / (variance + 1)))


class Denoiser(Backbone):
    img_size, num_classes = 4, 0
    dimmed = None  # of `through_tokenizer`: grey levels darker

    def __init__(self, net):
        self.net = net

    @classmethod
    def load(cls, checkpoint, device, **options):
        net = Gains()
        load_strict(net, read_checkpoint(checkpoint))
        return cls(net)

    def assign_labels(self, seeds, **settings):
        return None

    @torch.no_grad()
    def sample(self, seeds, labels, shrink):
        gain = self.net.gain.clamp(0.01, 0.99)
        return to_images(shrink * (gain / (1 - gain)).sqrt() * PerImageRandom(seeds).randn(1, 4, 4))

    def through_tokenizer(self, images):
        return None if self.dimmed is None else (images.float() - self.dimmed).clamp(0, 255).to(torch.uint8)

    def encode(self, prepared, generator):
        return (prepared.float() - 128) / UNIT

    def self_training_loss(self, x, labels, generator):
        noisy = x + torch.randn(x.shape, generator=generator)
        return (self.net.gain * noisy - x).square().sum((1, 2, 3)).mean()

    def network_config(self):
        return {"class": "Gains", "kwargs": {}}


class Exact(Denoiser):
    dimmed = 0


class Drifting(Denoiser):
    dimmed = 60


def to_images(x):
    return (x * UNIT + 128.5).clamp(0, 255).to(torch.uint8)


def of_variance(folder, variance, backbone=Denoiser):
    """theta_base, trained on data of that variance."""
    path = folder / f"gains-{variance}.safetensors"
    write_checkpoint(path, Gains(variance).state_dict())
    train = TrainSettings(images=512, batch_size=64, micro_batch_size=64, lr=1e-3)
    return Model(Row("toy/gains", backbone, 512, {"shrink": 0.7}, train, 1.0, {"shrink": 0.7}), path, CPU)


def drawn(folder, model, count=512, shrink=0.7):
    """S."""
    settings = {"shrink": shrink}
    generate_set(model.backbone, range(count), folder, settings=settings, batch_size=128, provenance={}, progress=False)
    return folder


def real_images(folder, variance=1.0, count=512):
    x = math.sqrt(variance) * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    write_images(folder, [f"{i:04d}.png" for i in range(count)], to_images(x))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """(folder, {"data": S of a base of variance 1.3, "real": images of variance 1})."""
    folder = tmp_path_factory.mktemp("toy")
    return folder, {"data": drawn(folder / "S", of_variance(folder, 1.3)), "real": real_images(folder / "real")}


def features(path):
    images = ImageSet(path)
    return images.images(np.arange(len(images))).double().flatten(1)


def distance(a, b):
    """Frechet distance of pixels taken as independent."""
    return float((a.mean(0) - b.mean(0)).square().sum() + (a.std(0) - b.std(0)).square().sum())


def test_the_loss_is_predicted_and_the_distance_is_not(here):
    """The case of the EDM quickstart: self-training lowers an overfitted base's loss on held-out images, and makes its
    samples worse, which a sampler of few steps draws too narrowly."""
    folder, sets = here
    model = of_variance(folder, 1.3)
    record = diagnose(model, **sets)
    assert record["cosine_without_noise"] > 0.9 and not record["warnings"] and record["predicts"] == PREDICTS
    assert "w > 0 should raise the loss" in summary(record) and "distance is another matter" in summary(record)

    backbone, images = model.load(), ImageSet(sets["real"])
    probe = Probe(backbone, CPU, 64, 8, 1, seed=3)
    backbone.net.requires_grad_(True)
    of_s = probe.gradient(probe.images_of(ImageSet(sets["data"])), "synthetic")
    away = sum(half[0] for half in of_s.halves)  # as theta_base - theta_syn of a plain step
    gain, base, losses, distances = backbone.net.gain, backbone.net.gain.detach().clone(), [], []
    for w in (-1.0, 0.0, 1.0):
        gain.data = base + w * 0.05 * away / away.abs().mean()
        losses.append(probe.gradient(probe.images_of(images), "real").loss)
        samples = backbone.sample(range(5000, 6000), None, shrink=0.7).double().flatten(1)
        distances.append(distance(samples, features(sets["real"])))
    assert losses[0] < losses[1] < losses[2], "as predicted"
    assert distances[0] > 1.2 * distances[1] > 1.2 * 1.2 * distances[2], "the other way round"


def test_an_underfitted_base_and_a_narrow_sampler_disagree(here):
    folder, sets = here
    narrow = of_variance(folder, 0.7)
    record = diagnose(narrow, drawn(folder / "S narrow", narrow), sets["real"])
    assert record["cosine_without_noise"] == pytest.approx(-1, abs=0.1)
    assert "w > 0 should lower the loss" in summary(record)


def test_reliability_is_spearman_and_brown_s_and_the_cosine_is_of_the_means():
    def gradient(first, second):
        return Gradient(([torch.tensor(first)], [torch.tensor(second)]))

    a, b = gradient([3.0, 0.0], [0.0, 4.0]), gradient([1.0, 1.0], [1.0, 0.0])
    assert a.reliability == 0 and a.norm == 2.5 and a.norm_without_noise == 0
    r = 1 / math.sqrt(2)
    assert b.reliability == pytest.approx(2 * r / (1 + r)) and b.norm_without_noise == 1
    assert a.dot(b) == pytest.approx(1.5 * 1.0 + 2.0 * 0.5)
    assert (b - b).norm == 0 and (b - b).reliability == 0


def test_noise_is_said_and_gives_no_sign(here):
    """The base of the real variance: its gradient on real images is noise."""
    folder, sets = here
    record = diagnose(of_variance(folder, 1.0), **sets)
    assert record["cosine_without_noise"] is None and record["real"]["reliability"] < 0.5
    assert "real images is mostly noise" in record["warnings"][0] and "no sign" in summary(record)


def test_more_draws_make_the_gradient_more_reliable_and_one_seed_gives_one_record(here):
    folder, sets = here
    few = Amount(num_images=32, micro_batch_size=16)
    once = diagnose(of_variance(folder, 1.3), **sets, amount=few)
    assert once == diagnose(of_variance(folder, 1.3), **sets, amount=few)
    often = diagnose(of_variance(folder, 1.3), **sets, amount=Amount(32, 16, draws=16))
    assert once["images"] == often["images"] == 32 and often["draws"] == 16
    assert often["real"]["reliability"] > once["real"]["reliability"] != often["real"]["reliability"]


def test_drift_of_the_tokenizer_is_measured_and_warned_of(here):
    folder, sets = here
    assert "drift" not in diagnose(of_variance(folder, 1.3), **sets)
    exact = diagnose(of_variance(folder, 1.3, Exact), **sets)
    assert exact["drift"]["grey_levels"] == exact["drift"]["norm"] == 0 and not exact["warnings"]
    drifting = diagnose(of_variance(folder, 1.3, Drifting), **sets)
    assert drifting["drift"]["of_signal"] > 3 and 50 < drifting["drift"]["grey_levels"] <= 60
    assert "drift exceeds signal" in drifting["warnings"][0] and "drift" in summary(drifting)


def test_the_neutral_sampler_is_the_floor_of_the_norm(here):
    folder, sets = here
    model = of_variance(folder, 1.3)
    floor = diagnose(model, **sets, neutral={"shrink": 1.0})
    assert floor["neutral"]["norm_without_noise"] < 0.3 * floor["synthetic"]["norm_without_noise"]
    assert floor["neutral"]["settings"] == {"shrink": 1.0} and not floor["warnings"]
    worse = diagnose(model, **sets, neutral={"shrink": 0.3})
    assert "neutral sampler is as large" in worse["warnings"][0]
    for same in ({}, {"shrink": 0.7}):
        assert "neutral" not in diagnose(model, **sets, neutral=same)
    assert "neutral" not in diagnose(model, **sets, neutral={"shrink": 1.0}, amount=Amount(neutral=False))


def test_the_step_that_was_made_has_the_slope_of_the_real_loss(here):
    folder, sets = here
    theta_syn = folder / "snapshot-000000064.safetensors"
    state = Gains(1.3).state_dict()
    write_checkpoint(theta_syn, {"gain": state["gain"] + 0.01})  # an optimizer that went the other way
    record = diagnose(of_variance(folder, 1.3), **sets, snapshot=theta_syn)
    assert record["cosine"] > 0 and record["step"]["cosine"] < -0.9
    # d/da of sum (a y - x)^2 per pixel: 2 (a (v + 1) - v), here with v = 1
    expected = -0.01 * 16 * 2 * (1.3 / 2.3 * 2 - 1)
    assert record["step"]["slope"] == pytest.approx(expected, rel=0.3)
    assert "w > 0 should lower the loss" in summary(record)


@pytest.mark.parametrize(("amount", "message"), [
    (Amount(micro_batch_size=300), "--micro_batch_size 300: two halves need twice as many images"),
    (Amount(num_images=64, micro_batch_size=64), "--num_images is 64"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused(here, amount, message):
    with pytest.raises(UserError, match=message):
        diagnose(of_variance(here[0], 1.3), **here[1], amount=amount)


# The command


def test_a_run_is_diagnosed_and_a_row_with_its_files(tmp_path, monkeypatch, capsys):
    make_files(tmp_path)
    row, out = pico_row(tmp_path), tmp_path / "run"
    real = drawn_real(tmp_path / "real")
    monkeypatch.setattr(diagnose_command, "find_row", lambda name: row if name == row.id else no_row(name))
    commands = type("Commands", (), {"checkpoint": ("--ckpt",), "base": (), "load": (), "load_training": (),
                                     "unbiased": {"contrast": 0.9}})  # fmt: skip
    monkeypatch.setattr(diagnose_command, "backbone_of", lambda row: commands)
    stopped = Reproduction(row, out, PLAN, CPU)
    with stopped.ledger.running(row.id, ""):
        stopped.files = {name: out / entry["path"] for name, entry in stopped.fetch().items()}
        assert "has not drawn S yet" in said(["diagnose", str(out), "--real", str(real)], capsys)
        stopped.generate()
    assert "--real is missing" in said(["diagnose", str(out)], capsys)

    line = said(["diagnose", str(out), "--real", str(real), "--draws", "2", "--json", str(tmp_path / "a.json")], capsys)
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert line.splitlines()[-1] == summary(record) and record["images"] == 40 and record["micro_batch_size"] == 2
    assert record["neutral"]["settings"] == {"contrast": 0.9} and "step" not in record

    stopped.finetune()
    flags = ["--base", row.base, "--data", str(out / "synthetic"), "--real", str(real), "--draws", "2"]
    said(["diagnose", row.id, *flags, "--json", str(tmp_path / "b.json")], capsys)
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == record, "the same files, named by hand"
    said(["diagnose", str(out), "--real", str(real), "--json", str(tmp_path / "c.json")], capsys)
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["step"]["snapshot"] == "snapshot-000000160"


def drawn_real(folder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    for label in range(4):
        part = images[label::4]
        write_images(folder / str(label), [f"{i}.png" for i in range(len(part))], part)
    return folder


def no_row(name):
    raise UserError(f"{name}: no such row")


def said(words, capsys):
    """What the command prints, errors too."""
    code = 0
    try:
        neon.main(words, standalone_mode=False)
    except UserError as error:
        code = error.exit_code
        print(error.message)
    assert code in (0, 2)
    return capsys.readouterr().out.strip()


def test_a_row_that_makes_its_base_asks_for_one(capsys):
    words = ["diagnose", "edm/digits", "--data", "S", "--real", "real"]
    assert "makes its own base; name that as --base, or a folder of neon reproduce" in said(words, capsys)
