"""Labels from file names, and sets that do not fit their network."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from edm.conftest import pico_backbone, write_pico

from neon_core.synthetic import write_images
from neon_edm.commands import COMMANDS, check_claims
from neon_edm.data import labels_of_names, make_labels
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_run.stages import Model, finetune

CPU = torch.device("cpu")
ROW = COMMANDS.find_row("cifar10_cond", None)


def write_set(folder, labels=(0, 1, 2, 3), size=8):
    names = [f"{i:06d}_label{k}.png" for i, k in enumerate(labels)]
    write_images(folder, names, torch.randint(256, (len(names), 3, size, size), dtype=torch.uint8))
    return folder


def test_only_labelled_images_count_and_the_last_label_of_a_name():
    names = ["b/1_label7.png", "a-b/x_label1.JPG", "a/x_label1.png", "_label5.png", "c.png", "d_label1.gif",
             "a_label1_label2.png", "e_label3.png.txt"]  # fmt: skip
    assert labels_of_names(names) == [("a-b/x_label1.JPG", 1), ("a/x_label1.png", 1), ("a_label1_label2.png", 2),
                                      ("b/1_label7.png", 7)]  # fmt: skip


def test_dataset_json_is_what_the_reader_wants(tmp_path):
    write_set(tmp_path / "set", labels=(3, 0, 2))
    (tmp_path / "set" / "._000000_label3.png").write_bytes(b"\0\5")  # as other systems leave them
    path, count = make_labels(tmp_path / "set")
    assert count == 3 and len(json.loads(path.read_text(encoding="utf-8"))["labels"]) == 3
    assert ImageSet(tmp_path / "set").class_indices.tolist() == [3, 0, 2]


def test_a_folder_without_labelled_names_is_refused_and_left_alone(tmp_path):
    (tmp_path / "000000.png").touch()
    with pytest.raises(UserError, match=r"000123_label7\.png"):
        make_labels(tmp_path)
    assert not (tmp_path / "dataset.json").exists()


def test_conditional_networks_refuse_sets_without_labels(tmp_path):
    images = ImageSet(write_set(tmp_path / "set"))
    with pytest.raises(UserError, match=r"no labels, but this network is conditional.*neon_edm\.data --root"):
        pico_backbone().check_set(images)
    pico_backbone(label_dim=0).check_set(images)


def test_images_of_another_size_are_refused(tmp_path):
    images = ImageSet(write_set(tmp_path / "set", size=16))
    with pytest.raises(UserError, match=r"\(3, 16, 16\).*\(3, 8, 8\)"):
        pico_backbone(label_dim=0).check_set(images)


def test_one_class_of_a_set_still_fits_the_whole_network(tmp_path):
    """The width of the labels is the network's, not the largest label plus one."""
    write_set(tmp_path / "set", labels=(1, 1, 1, 1))
    make_labels(tmp_path / "set")
    short = dataclasses.replace(ROW.train, images=8, batch_size=4, micro_batch_size=4, snapshot_images=4)
    model = Model(dataclasses.replace(ROW, train=short), write_pico(tmp_path / "base"), CPU)
    assert sorted(finetune(model, tmp_path / "set", tmp_path / "run")) == [4, 8]


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"cond": False}, "--cond False: the network has True"),
        ({"arch": "ncsnpp"}, "--arch ncsnpp: the network has ddpmpp"),
        ({"precond": "vp"}, "--precond vp: the network has edm"),
        ({"cres": "1,2,2,2"}, "--cres 1,2,2,2: the network has 1,1"),
        ({"cond": True, "arch": "ddpmpp", "precond": "edm", "cres": "1,1"}, None),
    ],
)
def test_what_the_official_flags_claim_is_checked(claims, said):
    expected = pytest.raises(UserError, match=said) if said else nullcontext()
    with expected:
        check_claims(pico_backbone(), claims)


def test_labels_beyond_the_network_are_refused_before_training(tmp_path):
    write_set(tmp_path / "set", labels=(0, 1, 2, 9))
    make_labels(tmp_path / "set")
    with pytest.raises(UserError, match="label 9 is out of range"):
        finetune(Model(ROW, write_pico(tmp_path / "base"), CPU), tmp_path / "set", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
