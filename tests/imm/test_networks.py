"""What the golden cases do not show: equality with a plain path, guidance, precisions, configurations."""

import pytest
import torch
from imm.reference_path import sample
from imm.tiny import LATENT, PIXEL, randomised

from neon_files.errors import UserError
from neon_imm.precond import IMMPrecond, build_network
from neon_imm.sampler import pushforward, time_grid
from neon_run.compiling import compile_network


@pytest.fixture
def net() -> IMMPrecond:
    return randomised(IMMPrecond(**LATENT)).eval()


def one_hot(*labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), 10).float()


def test_the_sampler_agrees_with_a_plain_one(net):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    ours = pushforward(net, latents, time_grid(net.schedule, "uniform", 4), one_hot(7, 0, 9), cfg=1.8)
    state = {name: value.detach() for name, value in net.model.state_dict().items()}
    plain = sample(state, latents, torch.tensor([7, 0, 9]), 4, 1.8, heads=4, patch=2)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert (ours - latents).abs().max() > 0.1


def test_guidance_takes_a_time_per_sample(net):
    x = torch.randn(3, 4, 8, 8)
    t, s = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.4, 0.2, 0.0])
    labels = one_hot(1, 2, 3)
    together = net.cfg_forward(x, t, s, labels, 1.5)
    alone = [net.cfg_forward(x[i : i + 1], t[i], s[i], labels[i : i + 1], 1.5) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_guidance_repeats_a_single_label_row(net):
    x, t, s = torch.randn(2, 4, 8, 8), torch.tensor(0.9), torch.tensor(0.2)
    one, two = (net.cfg_forward(x, t, s, labels, 2.0) for labels in (one_hot(4), one_hot(4, 4)))
    assert torch.equal(one, two)


def test_guidance_without_labels_is_a_clear_error(net):
    x, t, s = torch.randn(2, 4, 8, 8), torch.tensor(0.9), torch.tensor(0.2)
    with pytest.raises(UserError, match="none were given"):
        net.cfg_forward(x, t, s, None, 1.5)
    unconditional = IMMPrecond(**PIXEL).eval()
    with pytest.raises(UserError, match="knows no classes"):
        unconditional.cfg_forward(torch.randn(2, 3, 8, 8), t, s, None, 0.0)


def test_guidance_one_is_conditional_and_zero_unconditional(net):
    x, t, s, labels = torch.randn(2, 4, 8, 8), torch.tensor(0.9), torch.tensor(0.2), one_hot(4, 5)
    torch.testing.assert_close(net.cfg_forward(x, t, s, labels, 1.0), net(x, t, s, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.cfg_forward(x, t, s, labels, 0.0), net(x, t, s, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_is_close_and_its_output_keeps_the_sample_dtype(net, precision, tolerance):
    x, t, s, labels = torch.randn(2, 4, 8, 8), torch.tensor(0.9), torch.tensor(0.2), one_hot(4, 5)
    exact = net.cfg_forward(x, t, s, labels, 1.5)
    with torch.no_grad(), net.running(training=False, mixed_precision=precision):
        half = net.cfg_forward(x, t, s, labels, 1.5)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=tolerance, atol=tolerance)
    assert net.mixed_precision is None


def test_compiled_blocks_give_the_same_numbers_under_the_same_names(net):
    """The graphs and guards of this network; one test of one backbone generates kernels too."""
    x, t, s, labels = torch.randn(2, 4, 8, 8), torch.tensor(0.9), torch.tensor(0.2), one_hot(4, 5)
    with torch.no_grad():
        exact = net.cfg_forward(x, t, s, labels, 1.5)
        names = list(net.state_dict())
        compile_network(net, net.model.blocks, x.device, dynamic=False, backend="eager")
        torch.testing.assert_close(net.cfg_forward(x, t, s, labels, 1.5), exact, rtol=1e-4, atol=1e-4)
    assert list(net.state_dict()) == names


@pytest.mark.parametrize(
    "change, word",
    [
        ({"f_type": "other"}, "f_type"),
        ({"temb_type": "other"}, "temb_type"),
        ({"noise_schedule": "vp_cosine"}, "euler_fm"),
        ({"model_type": "DiT_XXL_2"}, "DiT_XXL_2"),
        ({"patch_size": 3}, "patch_size"),
        ({"num_heads": "four"}, "configuration"),
    ],
)
def test_a_configuration_that_makes_no_network_is_named(change, word):
    with pytest.raises(UserError, match=word):
        build_network({"class": "IMMPrecond", "kwargs": {**LATENT, **change}})


def test_a_network_of_another_class_is_refused():
    with pytest.raises(UserError, match="EDMPrecond"):
        build_network({"class": "EDMPrecond", "kwargs": {}})
