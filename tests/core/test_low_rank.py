"""`improve` of a LoRA: the weight that it changes is extrapolated, not its factors."""

import pytest
import torch
from core.discs import QUICK
from torch import nn

from neon_core.seeds import PerImageRandom
from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_run import improve
from neon_run.low_rank import factors_of

peft = pytest.importorskip("peft")


def adapted(**settings):
    """Two layers with a fresh LoRA of rank 2, scale 1.5, on the first; the same in every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings)
        return peft.inject_adapter_in_model(config, net)


def sample(net, seeds, labels):
    return net(PerImageRandom(seeds).randn(6))


def loss(net, images, labels, generator):
    """Draws the outputs together."""
    return net(torch.randn(len(images), 6, generator=generator)).square().mean()


def closeness(images):
    return -images.square().mean().item()


def test_theta_neon_has_the_extrapolated_weight(tmp_path):
    net = adapted()
    result = improve(net, sample=sample, loss=loss, score=closeness, out=tmp_path, distance=0.05, **QUICK)
    assert result.improved and result.neon < result.base
    (snapshot,) = (tmp_path / "finetune").glob("snapshot-*.safetensors")
    syn, (pair,) = read_checkpoint(snapshot).state, factors_of(adapted())
    change = 1.5 * syn["0.lora_B.default.weight"].double() @ syn["0.lora_A.default.weight"].double()
    torch.testing.assert_close(pair.change(syn), change)
    weight = net.state_dict()["0.base_layer.weight"]
    length = change.norm() / torch.cat([weight.flatten(), net.state_dict()["0.base_layer.bias"]]).norm()
    assert 0.03 < length < 0.08, "as far as asked, measured in the weight"
    neon = adapted()
    neon.load_state_dict(read_checkpoint(result.checkpoint).state)
    neon[0].merge()
    torch.testing.assert_close(neon[0].weight.double(), weight.double() - result.w * change, rtol=0, atol=1e-6)
    others = [name for name in syn if "lora" not in name]
    assert all(torch.equal(syn[name], net.state_dict()[name]) for name in others), "what is frozen stays so"
    again = improve(net, sample=sample, loss=loss, score=closeness, out=tmp_path, distance=0.05, **QUICK)
    assert again.neon == result.neon and len(list(tmp_path.glob("base-*.safetensors"))) == 1


def test_an_adapter_that_is_trained_already_or_no_plain_lora_is_refused(tmp_path):
    trained = adapted()
    nn.init.ones_(trained[0].lora_B["default"].weight)
    with pytest.raises(UserError, match=r"its LoRA is trained already \(0.lora_B.default.weight is not 0\); merge it"):
        improve(trained, sample=sample, loss=loss, score=closeness, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"net: 0.lora_magnitude_vector.default.weight makes it more than a plain LoRA"):
        improve(adapted(use_dora=True), sample=sample, loss=loss, score=closeness, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_without_an_adapter_has_no_factors():
    assert factors_of(nn.Linear(2, 2)) == []
