"""The row edm/fashion in miniature: what it prepares, its labels and guidance, S and a fine-tune on it."""

import pytest
import torch
from small_fashion import check_labels_and_guidance, check_s_and_fine_tune, in_miniature

from neon_core.finetune import open_set
from neon_edm.fashion import FASHION
from neon_edm.guidance import passes_per_image
from neon_files.checkpoint import read_checkpoint
from neon_run.backbones import find_row


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return in_miniature(FASHION, tmp_path_factory.mktemp("fashion"))


def test_the_row_is_found_by_its_name_and_begins_within_its_ranges():
    row = find_row("edm/fashion")
    assert row is FASHION
    for value, (low, high) in ((row.w, row.w_range), (row.evaluate["guidance"], row.axes["guidance"][:2])):
        assert low < value < high
    row.backbone.check_settings(**row.generate)
    row.backbone.check_settings(**row.evaluate)
    assert passes_per_image(row.evaluate) == 2 * (2 * row.evaluate["num_steps"] - 1)


def test_the_prepared_files_rebuild_the_network(prepared):
    model, files = prepared
    assert {"base", "longer", "reference", "heldout", "real_training", "detector"} == set(files)
    base, longer = (read_checkpoint(files[name]).state for name in ("base", "longer"))
    assert all(torch.equal(value, model.backbone.net.state_dict()[name]) for name, value in base.items())
    assert not torch.equal(base["model.image_out.weight"], longer["model.image_out.weight"])
    assert 1_200_000 < sum(p.numel() for p in model.backbone.net.parameters()) < 1_300_000
    model.backbone.check_set(open_set(files["real_training"]))


def test_initial_weights_are_drawn_from_the_seed(prepared, tmp_path):
    prepare = prepared[0].row.prepare
    first, again, other = (prepare.create(tmp_path, None, seed)[0].net.model.image_in.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_classes_go_round_and_guidance_changes_images(prepared):
    check_labels_and_guidance(prepared[0], "guidance", 2.0)


def test_s_is_made_and_the_base_is_fine_tuned_on_it(prepared, tmp_path):
    check_s_and_fine_tune(prepared[0], tmp_path)
