"""The row on Fashion-MNIST in miniature: prepared from a few images, and the scripts on its base."""

import dataclasses
import json

import pytest
import torch
from launch import call, fails

from neon_core.backbone import TrainSettings
from neon_files.checkpoint import read_checkpoint
from neon_run.fashion import prepare as module
from neon_run.fashion.data import Fashion
from neon_xar.fashion import BASE, FASHION, network
from neon_xar.patches import PatchXAR

CPU = torch.device("cpu")


def short(train: TrainSettings) -> TrainSettings:
    return dataclasses.replace(train, images=16, batch_size=8, micro_batch_size=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the row prepares from a hundred grey images."""
    labels = torch.arange(100) % 10
    images = (labels * 25).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 16, 16).contiguous()
    prepare = dataclasses.replace(FASHION.prepare, base=short(BASE), feature_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_fashion", lambda data: Fashion(images, labels, images[:70], labels[:70]))
        patch.setattr(module, "LEAST_ACCURACY", 0.0)
        return prepare(FASHION, tmp_path_factory.mktemp("fashion"), 0)


@pytest.fixture(scope="module")
def words(files):
    return "--preset", "xar/fashion", "--model_ckpt", files["base"], "--device", "cpu"


def test_the_base_of_a_run_is_the_network_of_the_row(files):
    net = PatchXAR.load(files["base"], CPU, **FASHION.load).net
    assert net.config == network().config and sum(p.numel() for p in net.parameters()) == 317_132


def test_a_base_is_a_function_of_its_training_seed(tmp_path):
    first, again, other = (FASHION.prepare.create(tmp_path, None, seed)[0].net.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["pred.weight"], other["pred.weight"])


def test_pixels_are_rounded_as_the_row_says_unless_the_flag_says_otherwise(words, tmp_path):
    for name, flags in {"round": (), "truncate": ("--rounding", "truncate")}.items():
        some = ("--num_images", 2, "--flow_steps", 3, "--outdir", tmp_path / name)
        call("xAR/generate.py", *words, *some, *flags)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["settings"] == {"cfg": FASHION.generate["cfg"], "flow_steps": 3, "rounding": name}
    fails("xAR/generate.py", *words, *some, "--vae_path", words[3], match="--vae_path .* leave the flag out")


def test_the_base_is_trained_on_its_own_images(files, words, tmp_path):
    call("xAR/generate.py", *words, "--num_images", 8, "--flow_steps", 3, "--outdir", tmp_path / "S")
    sizes = ("--images", 16, "--batch_size", 8, "--micro_batch_size", 8)
    call("xAR/finetune.py", *words, "--data", tmp_path / "S", "--outdir", tmp_path / "tuned", *sizes)
    (snapshot,) = (tmp_path / "tuned").glob("snapshot-*.safetensors")
    base = read_checkpoint(files["base"]).state
    assert not torch.equal(read_checkpoint(snapshot).state["pred.weight"], base["pred.weight"])
