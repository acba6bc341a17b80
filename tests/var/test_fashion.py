"""The Fashion-MNIST rows in miniature: what they prepare, S kept as tokens, a fine-tune on it."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from neon_files.image_set import ImageSet
from neon_run import stages
from neon_run.fashion import prepare as preparation
from neon_run.fashion.data import Fashion
from neon_var.fashion.prepare import PrepareVAR
from neon_var.fashion.rows import BASE, FASHION_ROWS, FINE_TUNE, fixed_filter
from neon_var.fashion.tokenizer import train_tokenizer
from neon_var.preprocessing import to_unit_range

CPU = torch.device("cpu")
TINY = {"batch_size": 8, "micro_batch_size": 8}


def stripes(count: int) -> torch.Tensor:
    """uint8 [count, 1, 16, 16]: ten classes of different stripes, each image of another brightness."""
    x, level = torch.arange(16), torch.linspace(0.5, 1, count)
    rows = [127 * (1 + torch.sin(x * (1 + k % 10) / 5)) * level[k] for k in range(count)]
    return torch.stack([row.expand(16, 16) for row in rows])[:, None].to(torch.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(a row with a short preparation, the files that it made)."""
    images, labels = stripes(120), torch.arange(120) % 10
    prepare = PrepareVAR(dataclasses.replace(BASE, images=16, **TINY), feature_steps=40, tokenizer_steps=4)
    row = fixed_filter(prepare, dataclasses.replace(FINE_TUNE, images=16, snapshot_images=16, **TINY), num_synthetic=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "load_fashion", lambda data: Fashion(images, labels, images[:80], labels[:80]))
        patch.setattr(preparation, "LEAST_ACCURACY", 0.0)
        return row, prepare(row, tmp_path_factory.mktemp("fashion"), 0)


@pytest.fixture(scope="module")
def model(prepared):
    row, files = prepared
    return stages.Model(row, files["base"], CPU, frozen={"vae_ckpt": files["vae_ckpt"]})


def test_the_prepared_network_is_small_and_draws_grey_images_of_sixteen_pixels(prepared, model):
    backbone = model.backbone
    assert set(prepared[1]) >= {"base", "longer", "reference", "heldout", "real_training", "detector", "vae_ckpt"}
    assert backbone.net.num_tokens == 21 and 240_000 < sum(p.numel() for p in backbone.net.parameters()) < 260_000
    images = backbone.sample(range(3), None, **model.row.evaluate)
    assert images.shape == (3, 1, 16, 16) and images.dtype == torch.uint8


def test_the_references_are_of_redrawn_images(prepared, model):
    images = stripes(120)[:80]
    redrawn = model.backbone.redraw(images)
    assert redrawn.shape == images.shape and not torch.equal(redrawn, images)
    detector = model.row.detector(prepared[1]["detector"], CPU)
    mean = np.load(prepared[1]["heldout"])["mu"]
    assert np.allclose(mean, detector(redrawn)["features"].double().mean(0), atol=1e-5)
    assert not np.allclose(mean, detector(images)["features"].double().mean(0), atol=1e-2)


def test_s_is_trained_on_as_the_tokens_that_were_drawn(model, tmp_path):
    stages.generate(model, tmp_path / "set")
    kept = ImageSet(tmp_path / "set")
    drawn = model.backbone.sample(range(20), None, **model.row.generate)
    assert kept.shape == (1, 1, 21) and torch.equal(torch.sort(kept.images(range(20)), dim=0)[0], drawn.sort(dim=0)[0])
    trained = model.load(training=True)
    encoded = trained.encode(trained.prepare(drawn), torch.Generator().manual_seed(0))
    assert torch.equal(encoded, drawn[:, 0, 0].long())
    pictures = model.backbone.sample(range(20), None, **model.row.evaluate)
    again = trained.encode(trained.prepare(pictures), torch.Generator())
    assert not torch.equal(encoded, again)  # through pixels they drift
    snapshots = stages.finetune(model, tmp_path / "set", tmp_path / "run")
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert list(snapshots) == [16] and np.isfinite(losses).all()


def test_the_control_on_real_images_sees_them_uncropped(prepared, model, tmp_path):
    real = ImageSet(prepared[1]["real_training"])
    backbone = model.load(training=True)
    images = real.images(np.arange(4))
    expected = torch.cat(backbone.vae.encode(to_unit_range(images)), dim=1)
    assert torch.equal(backbone.encode(backbone.prepare(images), torch.Generator()), expected)
    stages.finetune(model, prepared[1]["real_training"], tmp_path / "run", stages.TrainingRun(cache_dir=tmp_path / "c"))
    assert (tmp_path / "run" / "snapshot-000000016.safetensors").exists()


def test_the_tokenizer_learns_and_keeps_its_codes_alive():
    images = stripes(200)

    def error(num_steps):
        vae = train_tokenizer(images, seed=0, num_steps=num_steps)
        x = to_unit_range(images)
        return (vae.reconstruct(x)[-1] - x).square().mean(), len(torch.cat(vae.encode(x), dim=1).unique())

    (first, _), (later, used) = error(1), error(25)
    assert later < 0.5 * first and used > 20
    one, two = (train_tokenizer(images, seed=3, num_steps=2).state_dict() for _ in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_rows_claim_what_was_fixed_before_their_runs():
    fixed, free = FASHION_ROWS
    assert fixed.evaluate["top_p"] == fixed.generate["top_p"] == 0.9 and list(fixed.axes) == ["cfg"]
    assert (fixed.protocol.acceptance.neon, fixed.protocol.fresh_blocks) == (0.75, 2)
    assert list(free.axes) == ["cfg", "top_p", "temperature"] and free.protocol.acceptance is None
    assert (free.prepare, free.generate, free.train) == (fixed.prepare, fixed.generate, fixed.train)
