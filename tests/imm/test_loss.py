"""The teacher, the labels it sees, and the uniform and precision rules of the loss."""

import pytest
import torch
from imm.tiny import LATENT, PIXEL, latent_backbone, pixel_backbone, randomised

from neon_files.errors import UserError
from neon_imm.loss import IMMLoss
from neon_imm.precond import IMMPrecond

LOSS = IMMLoss(sample_t_mode="uniform", matrix_size=2, k=9)


class Recorder(IMMPrecond):
    """Keeps what each call was given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def forward(self, x, t, s, class_labels=None, force_fp32=False, **kwargs):
        self.seen.append(
            {"x": x, "t": t, "s": s, "labels": class_labels, "fp32": force_fp32, "grad": torch.is_grad_enabled()}
        )
        return super().forward(x, t, s, class_labels, force_fp32, **kwargs)


def draws(groups: int = 3, size: int = 2, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "u_t": torch.linspace(0.8, 0.95, groups, dtype=torch.float64),
        "u_s": torch.linspace(0.1, 0.3, groups, dtype=torch.float64),
        "noise": torch.randn(groups * size, 4, 8, 8, generator=g),
        "u_drop": torch.tensor([0.05, 0.5] * groups)[: groups * size],
    }


def test_student_and_teacher_get_what_the_paper_says():
    net = randomised(Recorder(**LATENT)).train().requires_grad_(True)
    labels = torch.nn.functional.one_hot(torch.arange(6), 10).float()
    loss, logs = LOSS.from_draws(net, torch.randn(6, 4, 8, 8), labels, **draws())
    student, teacher = net.seen
    assert student["grad"] and not teacher["grad"] and teacher["fp32"] and not student["fp32"]
    assert torch.equal(student["s"], teacher["s"])
    t, r, s = student["t"].flatten(), teacher["t"].flatten(), student["s"].flatten()
    assert (s < r).all() and (r < t).all()
    assert torch.equal(t[0::2], t[1::2])  # shared in a group
    assert torch.equal(teacher["labels"], labels)
    assert torch.equal(student["labels"][1::2], labels[1::2]) and not student["labels"][0::2].any()
    assert loss.shape == (3,) and loss.dtype == torch.float64 and loss.requires_grad
    assert torch.equal(logs["loss"], loss.detach())


def test_the_loss_vanishes_where_the_teacher_starts_from_the_same_time():
    net = randomised(IMMPrecond(**LATENT)).eval()
    same = IMMLoss(sample_t_mode="uniform", matrix_size=2, k=60)
    loss, logs = same.from_draws(net, torch.randn(6, 4, 8, 8), None, **draws())
    assert (logs["t_r_diff"].abs() < 1e-9).all()
    assert (loss.abs() < 1e-8).all()


def test_dropout_masks_are_shared_and_the_default_generator_moves_on():
    net = randomised(IMMPrecond(**{**PIXEL, "dropout": 0.5})).train()
    same = IMMLoss(sample_t_mode="uniform", matrix_size=2, k=60)
    images = torch.randn(4, 3, 8, 8)
    before = torch.get_rng_state()
    loss, _ = same.from_draws(
        net, images, None, u_t=torch.tensor([0.9, 0.8]), u_s=torch.tensor([0.1, 0.2]), noise=torch.randn(4, 3, 8, 8)
    )
    assert (loss.abs() < 1e-7).all()  # other masks would make two different functions
    assert not torch.equal(torch.get_rng_state(), before)


def test_all_randomness_comes_from_the_generator(tmp_path):
    backbone = latent_backbone(tmp_path)
    x, labels = torch.randn(8, 4, 8, 8), torch.arange(8)
    values = [backbone.self_training_loss(x, labels, torch.Generator().manual_seed(seed)).item() for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]


def test_autocast_around_the_loss_reaches_the_student_only(tmp_path):
    backbone = latent_backbone(tmp_path)
    seen = []
    original = backbone.net.network

    def network(*args, **kwargs):
        out = original(*args, **kwargs)
        seen.append(out.dtype)
        return out

    backbone.net.network = network
    with torch.autocast("cpu", torch.bfloat16):
        backbone.self_training_loss(torch.randn(8, 4, 8, 8), torch.arange(8), torch.Generator())
    assert seen == [torch.bfloat16, torch.float32] and backbone.net.mixed_precision is None


@pytest.mark.parametrize("make, changes, leaves_out", [
    (latent_backbone, {}, False),
    (latent_backbone, {"s_embed": False}, False),
    (pixel_backbone, {}, False),
    (pixel_backbone, {"augment_dim": 9}, True),
])  # fmt: skip
def test_ranks_search_for_parameters_only_where_a_step_leaves_some_out(tmp_path, make, changes, leaves_out):
    backbone = make(tmp_path, **changes)
    backbone.net.train().requires_grad_(True)
    x = torch.randn(8, backbone.net.img_channels, 8, 8)
    labels = torch.arange(8) if backbone.num_classes else None
    backbone.self_training_loss(x, labels, torch.Generator()).backward()
    left_out = [name for name, parameter in backbone.net.named_parameters() if parameter.grad is None]
    assert bool(left_out) == backbone.unused_parameters == leaves_out, left_out


def test_a_batch_that_the_group_size_does_not_divide_is_refused():
    net = IMMPrecond(**LATENT)
    with pytest.raises(UserError, match="matrix_size 4"):
        IMMLoss(sample_t_mode="uniform").from_draws(net, torch.randn(6, 4, 8, 8), None, **draws())


@pytest.mark.parametrize("mode", ["uniform", "lognormal"])
def test_times_are_ordered_for_any_uniforms(mode):
    loss, net = IMMLoss(sample_t_mode=mode, min_tr_gap=1e-4), IMMPrecond(**LATENT)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    t, r, s = loss.sample_times(net.schedule, u, u.flip(0))
    assert (s <= r).all() and (r <= t).all() and (t <= 0.994).all() and (s >= 0).all()


def test_labels_of_an_augmentation_reach_both_networks():
    net = randomised(IMMPrecond(**{**PIXEL, "augment_dim": 9})).train()
    given, seen = torch.randn(4, 9), []
    original = net.model.forward
    net.model.forward = lambda *args, **kwargs: seen.append(kwargs["augment_labels"]) or original(*args, **kwargs)
    times = {"u_t": torch.tensor([0.9, 0.8]), "u_s": torch.tensor([0.1, 0.2])}
    LOSS.from_draws(net, torch.randn(4, 3, 8, 8), None, **times, noise=torch.randn(4, 3, 8, 8), augment_labels=given)
    assert len(seen) == 2 and all(torch.equal(labels, given) for labels in seen)
