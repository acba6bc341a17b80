"""The quickstart's parts: exact grey levels, the small network in EDM's preconditioner, controls, report, pictures."""

import copy
import math

import numpy as np
import PIL.Image
import pytest
import torch

from neon_edm.guidance import Guided, passes_per_image
from neon_edm.perceptron import PixelPerceptron
from neon_edm.quickstart import digits, pictures, report
from neon_edm.quickstart.backbone import DigitsBackbone
from neon_edm.quickstart.features import NUM_FEATURES, DigitsDetector, accuracy, read_detector, train_features
from neon_files.checkpoint import write_checkpoint
from neon_files.image_set import ImageSet
from neon_files.image_zip import write_image_zip


@pytest.fixture(scope="module")
def split():
    return digits.load_digits_split(0)


def lively_backbone(seed=0) -> DigitsBackbone:
    """A fresh one whose zero-initialised layers are not 0, so that its output depends on everything."""
    backbone = DigitsBackbone.create(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in backbone.net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return backbone


# ------------------------------------------------------------------------------------------------------------ the data


def test_split_deals_every_digit_once(split):
    assert split.train_images.shape == (1197, 1, 8, 8) and split.heldout_images.shape == (600, 1, 8, 8)
    everything = torch.cat([split.train_images, split.heldout_images]).flatten(1)
    other = digits.load_digits_split(1)
    rest = torch.cat([other.train_images, other.heldout_images]).flatten(1)
    assert sorted(everything.tolist()) == sorted(rest.tolist())
    assert not torch.equal(split.train_images, other.train_images)
    assert torch.equal(split.train_images, digits.load_digits_split(0).train_images)


def test_the_17_grey_levels_survive_uint8():
    levels = torch.arange(17)
    stored = digits.levels_to_uint8(levels)
    assert stored.dtype == torch.uint8 and stored.min() == 0 and stored.max() == 255 and len(stored.unique()) == 17
    assert torch.equal(digits.grey_levels(stored), levels.float())
    assert torch.equal(digits.to_unit_range(stored), levels.float() / 8 - 1)


def test_sigma_data_is_that_of_the_digits(split):
    std = digits.to_unit_range(split.train_images).std().item()
    assert DigitsBackbone.create(0).loss.sigma_data == pytest.approx(std, abs=0.01)


# --------------------------------------------------------------------------------------------------------- the network


def test_denoiser_has_the_stated_size_and_begins_at_zero():
    net = PixelPerceptron(8, 1, 1, 10)
    assert sum(p.numel() for p in net.parameters()) == 536_704
    assert not net(torch.randn(3, 1, 8, 8), torch.zeros(3), torch.eye(10)[:3]).any()


def test_a_row_of_zeros_means_no_label_and_one_noise_level_serves_the_batch():
    net = lively_backbone().net.model
    x, noise = torch.randn(4, 1, 8, 8), torch.full((1,), 0.3)
    unlabelled = net(x, noise, torch.zeros(1, 10))
    assert torch.allclose(unlabelled, net(x, noise.expand(4), None), atol=1e-6)
    assert not torch.allclose(unlabelled, net(x, noise, torch.eye(10)[:4]), atol=1e-3)


def test_labels_are_dropped_in_training_only():
    net = lively_backbone().net.model
    net.label_dropout = 0.5
    x, noise, labels = torch.randn(64, 1, 8, 8), torch.zeros(1), torch.eye(10)[torch.arange(64) % 10]
    with_label, without = net(x, noise, labels), net(x, noise, None)
    mixed = net.train()(x, noise, labels)
    dropped = torch.isclose(mixed, without, atol=1e-6).flatten(1).all(1)
    kept = torch.isclose(mixed, with_label, atol=1e-6).flatten(1).all(1)
    assert (dropped ^ kept).all() and 16 <= dropped.sum() <= 48
    assert torch.equal(net.eval()(x, noise, labels), with_label)


# -------------------------------------------------------------------------------------------------------- the backbone


def test_samples_are_grey_level_images_that_depend_on_their_own_seed_only():
    backbone = lively_backbone()
    seeds = list(range(40, 60))
    labels = backbone.assign_labels(seeds)
    assert labels.tolist() == [seed % 10 for seed in seeds]
    images = backbone.sample(seeds, labels, num_steps=4)
    assert images.shape == (20, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images, digits.levels_to_uint8(digits.grey_levels(images)))
    assert len(images.unique()) > 5
    alone = backbone.sample(seeds[7:8], labels[7:8], num_steps=4)
    # Another batch size sums in another order; a pixel on the edge between two levels may fall to either side.
    difference = (digits.grey_levels(alone[0]) - digits.grey_levels(images[7])).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.05


def test_guidance_moves_away_from_the_case_without_a_label():
    backbone = lively_backbone()
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor(0.7), torch.eye(10)[:3]
    labelled, free = backbone.net(x, sigma, labels), backbone.net(x, sigma, torch.zeros(3, 10))
    guided = Guided(backbone.net, 1.7)(x, sigma, labels)
    assert torch.allclose(guided, free + 1.7 * (labelled - free), atol=1e-5)
    seeds, plain = [1, 2, 3], {"num_steps": 4}
    one = backbone.sample(seeds, torch.arange(3), **plain)
    assert torch.equal(one, backbone.sample(seeds, torch.arange(3), guidance=1.0, **plain))
    assert not torch.equal(one, backbone.sample(seeds, torch.arange(3), guidance=3.0, **plain))
    assert passes_per_image(plain) == 7 and passes_per_image({"guidance": 1.5, **plain}) == 14


def test_a_checkpoint_brings_back_network_and_loss(tmp_path):
    backbone = lively_backbone()
    path = tmp_path / "digits.safetensors"
    write_checkpoint(path, backbone.net.state_dict(), config=backbone.network_config())
    loaded = DigitsBackbone.load(path, torch.device("cpu"))
    assert loaded.loss == backbone.loss and loaded.loss.sigma_data == 0.75
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    assert torch.equal(loaded.net(x, sigma, torch.eye(10)[:2]), backbone.net(x, sigma, torch.eye(10)[:2]))


def test_progress_counts_network_passes(split):
    backbone, counted = lively_backbone(), []
    backbone.on_passes = counted.append
    backbone.sample([1, 2], torch.tensor([1, 2]), num_steps=18)
    x = backbone.encode(split.train_images[:4], torch.Generator())
    backbone.self_training_loss(x, split.train_labels[:4], torch.Generator().manual_seed(0))
    assert counted == [2 * 35, 3 * 4]


def test_batches_are_drawn_with_replacement_over_the_whole_set():
    order = DigitsBackbone.create(0).data_order(50, 128, seed=3)
    batches = [next(order) for _ in range(5)]
    assert all(len(b) == 128 and b.min() >= 0 and b.max() < 50 for b in batches)
    assert set(np.concatenate(batches)) == set(range(50))
    assert np.array_equal(batches[0], next(DigitsBackbone.create(0).data_order(50, 128, seed=3)))


# ---------------------------------------------------------------------------------------------------- what is prepared


def test_the_feature_network_learns_digits_and_its_file_brings_it_back(split, tmp_path):
    network = train_features(split.train_images, split.train_labels, seed=1, num_steps=120)
    assert accuracy(network, split.heldout_images, split.heldout_labels) > 0.85
    path = tmp_path / "features.safetensors"
    write_checkpoint(path, network.state_dict())
    detector, few = read_detector(path, torch.device("cpu")), split.heldout_images[:5]
    found = detector(few)
    assert found["features"].shape == (5, NUM_FEATURES) and found["logits"].shape == (5, 10)
    assert all(torch.equal(found[name], DigitsDetector(network, "")(few)[name]) for name in found)


def test_the_real_digits_survive_their_archive_and_equal_digits_make_equal_files(split, tmp_path):
    few, labels = split.train_images[:30], split.train_labels[:30]
    for name in ("one.zip", "two.zip"):
        write_image_zip(tmp_path / name, few, labels)
    read = ImageSet(tmp_path / "one.zip")
    assert torch.equal(read.images(range(30)), few) and torch.equal(read.class_indices, labels)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


# ---------------------------------------------------------------------------------------------------------- the report


def a_result(seed=0, base=2.0, self_trained=3.0, neon=1.4, random=2.05, w_star=1.5) -> dict:
    def point(heldout):
        return {"train": heldout / 2, "heldout": heldout}

    values = {"base": base, "self_trained": self_trained, "neon_fixed": 1.5, "neon": neon}
    values |= {"random_direction": random, "real_data": 2.02}
    curve = {-1.0: self_trained, 0.0: base, 1.0: 1.5, 1.5: neon, 3.0: 1.8}
    return {
        "seed": seed,
        "w_star": w_star,
        "real": {"heldout": 1.0, "pixels": 0.3, "variance": 18.0},
        "pixels": {place: {"pixels": value / 4, "variance": 16.0} for place, value in values.items()},
        "report": {place: point(value) for place, value in values.items()},
        "curve": [{"w": w, **point(value)} for w, value in curve.items()],
    }


def test_a_run_that_shows_the_effect_is_accepted():
    assert report.failures([a_result(0), a_result(1)]) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"self_trained": 2.7}, "self-trained is 1.35"),
        ({"neon": 1.7}, "Neon is 0.85"),
        ({"w_star": 0.75}, "w* is 0.75"),
        ({"random": 1.7}, "random direction is 0.85"),
        ({"neon": math.nan}, "Neon is nan"),
    ],
)
def test_every_acceptance_rule_can_fail_and_names_its_seed(change, named):
    (sentence,) = report.failures([a_result(0), a_result(7, **change)])
    assert sentence.startswith("seed 7:") and named in sentence


def test_the_fast_form_is_judged_by_directions():
    assert report.wrong_directions([a_result(neon=1.9, random=3.0)]) == []
    (worse,) = report.wrong_directions([a_result(self_trained=1.9)])
    assert "not worse" in worse
    result = a_result()
    result["report"]["neon_fixed"]["heldout"] = math.nan
    (better,) = report.wrong_directions([result])
    assert "not better" in better


def test_the_table_states_the_means_of_the_changes():
    text = report.table([a_result(0), a_result(1, neon=1.0)])
    (line,) = [line for line in text.splitlines() if line.startswith("Neon, w = w*")][:1]
    assert line.split()[-4:] == ["1.40", "1.00", "-40", "%"]  # the mean of -30 % and -50 %
    assert "base 2.00 -> self-trained 3.00, Neon 1.20 (-30 to -50 %)" in report.summary(
        [a_result(0), a_result(1, neon=1.0)]
    )


def test_the_grid_copies_pixels_without_resampling(tmp_path):
    images = (np.random.default_rng(0).integers(0, 256, (4, 100, 1, 8, 8))).astype(np.uint8)
    samples = {name: images[i] for i, (name, *_) in enumerate(pictures.PANELS)}
    pictures.draw_grid(samples, a_result(), tmp_path / "grid.png")
    picture = np.asarray(PIL.Image.open(tmp_path / "grid.png").convert("L"))
    sheet, zoom = pictures.tile(images[3]), pictures.ZOOM
    second_row = 8 * zoom + pictures.GAP
    assert np.array_equal(sheet[second_row::zoom][:8, : 8 * zoom : zoom], 255 - images[3, 10, 0])
    height, width = sheet.shape
    bottom, right = picture.shape[0] - pictures.MARGIN, picture.shape[1] - pictures.MARGIN
    assert np.array_equal(picture[bottom - height : bottom, right - width : right], sheet)


def test_the_curve_is_drawn_for_any_number_of_seeds(tmp_path):
    few, many = [a_result(0)], [copy.deepcopy(a_result(seed)) for seed in range(8)]
    sizes = []
    for name, results in (("few", few), ("many", many)):
        pictures.draw_curve(results, tmp_path / f"{name}.png")
        with PIL.Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] and sizes[0][0] >= 1200
