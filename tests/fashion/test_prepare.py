"""What a row on Fashion-MNIST prepares, with a stand-in for the backbone and a few images."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from neon_core.backbone import Backbone, TrainSettings
from neon_files.checkpoint import read_checkpoint, read_state
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_metrics.reference import load_reference
from neon_run.fashion import prepare as module
from neon_run.fashion.data import Fashion
from neon_run.fashion.prepare import PrepareFashion
from neon_run.reproduce.reproduction import with_data
from neon_run.row import Row


class Shift(Backbone):
    """Learns the mean of the images."""

    img_size, num_classes = 16, 10

    def __init__(self):
        self.net = torch.nn.Linear(1, 1, bias=False)

    def network_config(self):
        return {"class": "Linear", "kwargs": {}}

    def self_training_loss(self, x, labels, generator):
        return (self.net.weight.mean() - x.float().mean() / 255).square()


@dataclass(frozen=True)
class PrepareShift(PrepareFashion):
    def create(self, folder, fashion, seed):
        frozen = folder / "frozen.txt"
        frozen.write_text("tokenizer", encoding="utf-8")
        torch.manual_seed(seed)
        return Shift(), {"tokenizer": frozen}


BASE = TrainSettings(images=8, batch_size=4, micro_batch_size=4, lr=0.1)


def row(prepare) -> Row:
    return Row(id="x/fashion", backbone=Shift, num_synthetic=2, generate={}, train=BASE, w=1.0, evaluate={},
               prepare=prepare)  # fmt: skip


@pytest.fixture
def fashion(monkeypatch):
    """Ten classes that differ in brightness, so that a few steps tell them apart."""
    labels = torch.arange(100) % 10
    images = (labels * 25).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 16, 16).contiguous()
    found = Fashion(images, labels, images[:70], labels[:70])
    monkeypatch.setattr(module, "load_fashion", lambda data: found)
    monkeypatch.setattr(module, "LEAST_ACCURACY", 0.15)
    return found


def test_everything_is_prepared_once(tmp_path, fashion):
    prepare = PrepareShift(BASE, feature_steps=40)
    files = prepare(row(prepare), tmp_path, 0)
    assert sorted(files) == ["base", "detector", "heldout", "longer", "real_training", "reference", "tokenizer"]
    assert all(path.exists() and path.is_relative_to(tmp_path) for path in files.values())
    real = ImageSet(files["real_training"])
    assert len(real) == 100 and real.class_indices.tolist() == fashion.train_labels.tolist()
    assert load_reference(files["reference"]).sigma.shape == (64, 64)
    assert read_checkpoint(files["base"]).state["weight"] != read_checkpoint(files["longer"]).state["weight"]
    before = {name: path.stat().st_mtime_ns for name, path in files.items() if name != "tokenizer"}
    assert prepare(row(prepare), tmp_path, 0) == files
    assert {name: files[name].stat().st_mtime_ns for name in before} == before


def test_the_longer_base_continues_the_base(tmp_path, fashion):
    """The first half of the long training is the base's own."""
    prepare = PrepareShift(BASE, feature_steps=40)
    files = prepare(row(prepare), tmp_path / "a", 0)
    short = dataclasses.replace(prepare, base=dataclasses.replace(BASE, images=4))
    again = short(row(short), tmp_path / "b", 0)
    assert torch.equal(
        read_state(again["longer"], ["weight"])["weight"], read_state(files["base"], ["weight"])["weight"]
    )
    assert prepare.training_images == 16


def test_a_classifier_that_is_wrong_too_often_ends_the_run_before_training(tmp_path, fashion, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ACCURACY", 1.1)
    prepare = PrepareShift(BASE, feature_steps=2)
    with pytest.raises(UserError, match="of the held-out images right, fewer than 110 %"):
        prepare(row(prepare), tmp_path, 0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_data_go_to_rows_that_take_them(tmp_path):
    prepare = PrepareShift(BASE)
    assert with_data(row(prepare), "photos").data == "photos"
    assert with_data(row(prepare), None) is prepare
    with pytest.raises(UserError, match="x/fashion is not trained here"):
        with_data(row(None), "photos")
