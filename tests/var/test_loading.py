"""Published containers and wrong files: what fits is loaded strictly, what does not is told in one line."""

import pytest
import torch
from var.tiny import VAE_KWARGS, tiny_vae, tiny_var, write_tiny

from neon_files.errors import UserError
from neon_var import loading
from neon_var.architectures import ARCHITECTURES, Architecture
from neon_var.loading import load_vae, load_var
from neon_var.var import VAR

SMALL = {"vocab_size": 64, "Cvae": 8, "num_classes": 10}


@pytest.fixture
def small_presets(monkeypatch):
    """The two presets with codes and classes of toy size, so that published-like files are small."""

    class Toy(Architecture):
        def network(self, depth=None):
            return super().network(depth) | SMALL

    for name, depth in (("imagenet_256", 1), ("imagenet_512", 2)):
        real = ARCHITECTURES[name]
        monkeypatch.setitem(ARCHITECTURES, name, Toy(real.patch_nums, depth, real.shared_aln))


def published(tmp_path, preset="imagenet_256", depth=None, wrap=lambda state: state, name="var.pth"):
    net = VAR(**ARCHITECTURES[preset].network(depth)).init_weights()
    torch.save(wrap(net.state_dict()), tmp_path / name)
    return net, tmp_path / name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"trainer": {"var_wo_ddp": s, "config": {}}, "epoch": 3},
        lambda s: {"var_wo_ddp": s},
        lambda s: {"state_dict": s},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
    ids=["flat", "trainer", "var_wo_ddp", "state_dict", "compiled", "ddp"],
)
def test_every_published_nesting_loads(tmp_path, small_presets, wrap):
    net, path = published(tmp_path, wrap=wrap)
    loaded, _ = load_var(path, "imagenet_256")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())


def test_another_depth_is_named_and_then_accepted(tmp_path, small_presets):
    _, path = published(tmp_path, depth=3)
    with pytest.raises(UserError, match=r"VAR-d3.*--model_depth 3"):
        load_var(path, "imagenet_256")
    assert load_var(path, "imagenet_256", depth=3)[0].depth == 3


def test_the_other_resolution_is_named(tmp_path, small_presets):
    _, path = published(tmp_path, "imagenet_512")
    with pytest.raises(UserError, match=r"2240 tokens.*--preset imagenet_512"):
        load_var(path, "imagenet_256")


def test_a_file_of_ours_with_another_resolution_is_refused(tmp_path, small_presets):
    from neon_files.checkpoint import write_checkpoint

    kwargs = ARCHITECTURES["imagenet_512"].network()
    path = tmp_path / "var.safetensors"
    write_checkpoint(path, VAR(**kwargs).init_weights().state_dict(), config={"class": "VAR", "kwargs": kwargs})
    with pytest.raises(UserError, match="512 pixels a side; use the preset imagenet_512"):
        load_var(path, "imagenet_256")


def test_a_vqvae_is_not_taken_for_a_var_nor_the_other_way(tmp_path):
    var, vae = write_tiny(tmp_path)
    with pytest.raises(UserError, match="is a VQVAE"):
        load_var(vae, "imagenet_256")
    with pytest.raises(UserError, match="is not a VQVAE"):
        load_vae(var, tiny_var())


def test_a_vqvae_with_another_vocabulary_is_refused(tmp_path):
    _, vae = write_tiny(tmp_path)
    with pytest.raises(UserError, match=r"64 codes of width 8.*32 of width 8"):
        load_vae(vae, tiny_var(vocab_size=32))


def test_a_foreign_network_is_refused(tmp_path, small_presets):
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a VAR checkpoint"):
        load_var(tmp_path / "other.pth", "imagenet_256")


def test_a_missing_file_names_the_command_that_fetches_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"missing\.pth.*download_models\.sh"):
        load_var(tmp_path / "missing.pth", "imagenet_256")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "OFFICIAL_PLACES", ())
    with pytest.raises(UserError, match=r"vae_ch160v4096z32\.pth.*download_models\.sh"):
        load_vae(None, tiny_var())


def test_a_missing_key_is_named(tmp_path):
    from var.tiny import VAR_KWARGS

    from neon_files.checkpoint import write_checkpoint

    state = tiny_var().state_dict()
    del state["blocks.1.attn.q_bias"]
    write_checkpoint(tmp_path / "cut.safetensors", state, config={"class": "VAR", "kwargs": VAR_KWARGS})
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.q_bias"):
        load_var(tmp_path / "cut.safetensors", "imagenet_256")


def test_usage_counts_of_another_number_of_scales_do_not_matter(tmp_path):
    from neon_files.checkpoint import write_checkpoint

    state = tiny_vae().state_dict()
    state["quantize.ema_vocab_hit_SV"] = torch.ones(7, 64)
    path = tmp_path / "vae.safetensors"
    write_checkpoint(path, state, config={"class": "VQVAE", "kwargs": VAE_KWARGS})
    vae = load_vae(path, tiny_var())
    assert vae.quantize.ema_vocab_hit_SV.shape == (3, 64) and not vae.quantize.ema_vocab_hit_SV.any()


def test_building_a_network_leaves_torch_as_it_was():
    """The official factory switches off the initialisation of every later module of the process."""
    before = torch.nn.Linear.reset_parameters
    with torch.device("meta"):
        VAR(**ARCHITECTURES["imagenet_256"].network())
    assert torch.nn.Linear.reset_parameters is before
    assert torch.nn.Linear(400, 400).weight.abs().max() <= 0.05 + 1e-6
