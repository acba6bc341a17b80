"""EDM behind the contract: labels, eval mode, the loss and its randomness, files."""

import pickle

import pytest
import torch
from edm.conftest import PICO, pico_backbone, pico_net, write_pico
from torch._dynamo.utils import counters

from neon_core.seeds import PerImageRandom
from neon_edm.backbone import EDMBackbone, augmentation
from neon_edm.commands import COMMANDS
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_run.compiling import compile_network
from neon_run.merging.files import merge_files

CPU = torch.device("cpu")


def test_conditional_sets_get_random_classes_by_default(backbone):
    seeds = list(range(600))
    labels = backbone.assign_labels(seeds)
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(labels[100:103], pico_backbone().assign_labels(seeds[100:103])), "a label belongs to its seed"
    assert backbone.assign_labels(seeds[:3], class_idx=2).tolist() == [2, 2, 2]


def test_unconditional_networks_have_no_labels_and_take_no_class():
    backbone = pico_backbone(label_dim=0)
    assert backbone.num_classes == 0 and backbone.assign_labels([1, 2]) is None
    assert backbone.sample([1], None, num_steps=2).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="--class 1: this network is unconditional"):
        backbone.assign_labels([1, 2], class_idx=1)


def test_a_class_out_of_range_is_refused(backbone):
    with pytest.raises(UserError, match="--class 4: this network has classes 0 to 3"):
        backbone.assign_labels([1], class_idx=4)


def test_the_class_reaches_the_image(backbone):
    zero, one = (backbone.sample([7], torch.tensor([k]), num_steps=3) for k in (0, 1))
    assert not torch.equal(zero, one)


def test_sampling_never_uses_dropout(backbone):
    labels = backbone.assign_labels([1, 2])
    expected = backbone.sample([1, 2], labels, num_steps=3)
    backbone.net.train()
    assert torch.equal(backbone.sample([1, 2], labels, num_steps=3), expected)
    assert backbone.net.training, "a fine-tune that samples in between goes on in train mode"


def test_loss_draws_everything_from_its_generator():
    backbone = pico_backbone(dropout=0.0, augment=augmentation(0.5))
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3])

    def loss(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(backbone.self_training_loss(backbone.encode(images, generator), labels, generator))

    first = loss(1)
    torch.manual_seed(99)
    assert loss(1) == first and loss(2) != first


def test_loss_is_summed_over_pixels_and_averaged_over_images(backbone):
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    x = backbone.encode(images, torch.Generator())
    assert x.dtype == torch.float32 and float(x.min()) >= -1 and float(x.max()) <= 1
    labels = torch.tensor([0, 1, 2, 3])
    map_ = backbone.loss(backbone.net, x, backbone.one_hot(labels), backbone.random(torch.Generator().manual_seed(3)))
    total = backbone.self_training_loss(x, labels, torch.Generator().manual_seed(3))
    assert map_.shape == (4, 3, 8, 8)
    assert float(total) == pytest.approx(float(map_.sum()) / 4)


def test_augmented_networks_see_the_labels_of_the_augmentation():
    plain, augmented = pico_backbone(dropout=0.0), pico_backbone(dropout=0.0, augment=augmentation(1.0))
    seen = []
    augmented.net.model.map_augment.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    for backbone in (plain, augmented):
        backbone.self_training_loss(x, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert seen[0].shape == (2, 9) and bool(seen[0].any())


@pytest.mark.parametrize("augment, changes, leaves_out", [
    (None, {}, True),
    (None, {"model_type": "DhariwalUNet"}, True),
    (None, {"augment_dim": 0}, False),
    (augmentation(0.2), {}, False),
    (augmentation(0.2), {"model_type": "DhariwalUNet"}, False),
])  # fmt: skip
def test_ranks_search_for_parameters_only_where_a_step_leaves_some_out(augment, changes, leaves_out):
    backbone = pico_backbone(augment=augment, **changes)
    backbone.net.train().requires_grad_(True)
    backbone.self_training_loss(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), torch.Generator()).backward()
    left_out = [name for name, parameter in backbone.net.named_parameters() if parameter.grad is None]
    assert bool(left_out) == backbone.unused_parameters == leaves_out, left_out


@pytest.mark.parametrize("class_name", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_what_is_written_is_what_is_loaded(tmp_path, class_name):
    net = pico_net(3, class_name)
    config = {"class": class_name, "kwargs": PICO}
    write_checkpoint(tmp_path / "net.safetensors", net.state_dict(), config=config)
    loaded = EDMBackbone.load(tmp_path / "net.safetensors", CPU)
    assert type(loaded.net).__name__ == class_name and not loaded.net.training
    assert loaded.network_config() == config
    assert list(loaded.net.state_dict()) == list(net.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert (loaded.net.sigma_min, loaded.net.sigma_max) == (net.sigma_min, net.sigma_max)


def test_buffers_come_from_the_file(tmp_path, backbone):
    state = {k: v + 1e-3 if k.endswith("resample_filter") else v for k, v in backbone.net.state_dict().items()}
    write_checkpoint(tmp_path / "net.safetensors", state, config=backbone.network_config())
    loaded = EDMBackbone.load(tmp_path / "net.safetensors", CPU).net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_published_pickles_load_and_merge_with_our_snapshots(tmp_path, golden_data):
    """Base: a pickle with positional constructor arguments; the merge keeps what it says about its network."""
    base = golden_data / "edm" / "pickle_ema_only_cuda.pkl"
    backbone = EDMBackbone.load(base, CPU)
    assert backbone.img_size == 8 and backbone.config["kwargs"]["img_channels"] == 3
    state = {name: value + 0.25 for name, value in backbone.net.state_dict().items()}
    write_checkpoint(tmp_path / "syn.safetensors", state, config=backbone.network_config())
    merge_files(base, tmp_path / "syn.safetensors", 2.0, tmp_path / "neon.safetensors")
    neon = EDMBackbone.load(tmp_path / "neon.safetensors", CPU)
    for name, parameter in backbone.net.named_parameters():
        assert torch.allclose(dict(neon.net.named_parameters())[name], parameter - 0.5, atol=1e-6), name


def test_a_row_sets_dropout_and_augmentation_of_the_fine_tune(tmp_path):
    path = write_pico(tmp_path / "net.safetensors")
    row = COMMANDS.find_row("ffhq64", None)
    assert not row.load
    backbone = EDMBackbone.load(path, CPU, **row.load_training)
    dropouts = {module.dropout for module in backbone.blocks()}
    assert dropouts == {0.05} and backbone.augment == augmentation(0.15)
    assert EDMBackbone.load(path, CPU).augment is None


def test_augmenting_a_network_without_augment_labels_is_refused(tmp_path):
    path = write_pico(tmp_path / "net.safetensors", augment_dim=0)
    with pytest.raises(UserError, match="--augment 0"):
        EDMBackbone.load(path, CPU, augment=0.15)


def test_foreign_files_are_refused_by_name(tmp_path, backbone):
    bare = tmp_path / "bare.pt"
    torch.save(backbone.net.state_dict(), bare)
    with pytest.raises(UserError, match=r"bare\.pt: has no configuration of its network"):
        EDMBackbone.load(bare, CPU)
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, backbone.net.state_dict(), config={"class": "VAR", "kwargs": {}})
    with pytest.raises(UserError, match="VAR is not one of EDMPrecond"):
        EDMBackbone.load(other, CPU)
    strange = tmp_path / "strange.safetensors"
    write_checkpoint(strange, backbone.net.state_dict(), config={"class": "EDMPrecond", "kwargs": PICO | {"depth": 3}})
    with pytest.raises(UserError, match="depth"):
        EDMBackbone.load(strange, CPU)
    wider = tmp_path / "wider.safetensors"
    write_checkpoint(
        wider, backbone.net.state_dict(), config={"class": "EDMPrecond", "kwargs": PICO | {"label_dim": 5}}
    )
    with pytest.raises(UserError, match=r"map_label\.weight"):
        EDMBackbone.load(wider, CPU)
    hostile = tmp_path / "hostile.pkl"
    hostile.write_bytes(pickle.dumps({"ema": print}))
    with pytest.raises(UserError, match=r"hostile\.pkl.*print"):
        EDMBackbone.load(hostile, CPU)


def test_the_labels_of_a_seed_list_are_drawn_once(backbone, monkeypatch):
    seeds = [7, 3, 1_000_000]
    first, drawn = backbone.assign_labels(seeds), []

    def watched(seeds, device):
        drawn.extend(seeds)
        return PerImageRandom(seeds, device)

    monkeypatch.setattr("neon_edm.backbone.PerImageRandom", watched)
    assert torch.equal(backbone.assign_labels(seeds), first) and not drawn
    assert torch.equal(backbone.assign_labels([3, 5, 7])[[0, 2]], first[[1, 0]]) and drawn == [5]


def test_a_compiled_network_gives_the_same_images_from_two_graphs(backbone):
    """One of the first batch, and one of the last, smaller one, which serves all other sizes too."""
    batches = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    plain = [backbone.sample(seeds, backbone.assign_labels(seeds), num_steps=2) for seeds in batches]
    before = counters["stats"]["unique_graphs"]
    compile_network(backbone.net, [backbone.net.model], torch.device("cpu"), dynamic=False, backend="eager")
    for seeds, images in zip(batches, plain, strict=True):
        assert torch.equal(backbone.sample(seeds, backbone.assign_labels(seeds), num_steps=2), images)
    assert counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_moves_pixels_a_little_and_leaves_the_network_as_it_was(backbone, precision):
    labels, before = backbone.assign_labels([1, 2]), {k: v.clone() for k, v in backbone.net.state_dict().items()}
    exact = backbone.sample([1, 2], labels, num_steps=4)
    half = backbone.sample([1, 2], labels, num_steps=4, precision=precision)
    difference = (half.float() - exact.float()).abs()
    assert 0 < difference.mean() < 2, "of 256 levels; single pixels of a random network move by some twenty"
    after = backbone.net.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert torch.equal(backbone.sample([1, 2], labels, num_steps=4, precision="auto"), exact)
    assert torch.equal(backbone.sample([1, 2], labels, num_steps=4, precision="fp32"), exact)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="--precision fp8: choose auto, fp32, fp16, bf16"):
        EDMBackbone.check_settings(precision="fp8")
