"""The shared autoencoder: three spellings of its keys, chunks, the clamp."""

import json

import pytest
import torch
from xar.pico import pico_vae

from neon_core.kl_vae import AutoencoderKL, posterior, to_diffusers_names, to_ldm_names


@pytest.fixture
def key_map(golden_data):
    return json.loads((golden_data / "imm" / "vae_key_map.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("column", [0, 1], ids=["current", "published"])
def test_both_diffusers_spellings_map_key_by_key(key_map, column):
    marked = {row[column]: torch.full([1], float(i)) for i, row in enumerate(key_map)}
    ours = to_ldm_names(marked)
    assert {row[2]: float(i) for i, row in enumerate(key_map)} == {name: value.item() for name, value in ours.items()}


@pytest.mark.parametrize("legacy", [False, True])
def test_renaming_there_and_back_keeps_every_weight(legacy):
    state = AutoencoderKL(embed_dim=4, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, resolution=64).state_dict()
    theirs = to_diffusers_names(state, legacy)
    shared = {k for k in state if "conv_in" in k or ".conv_out" in k or k.startswith(("quant", "post_quant"))}
    assert set(theirs) & set(state) == shared
    matrix = next(value for name, value in theirs.items() if name.endswith(("to_q.weight", "query.weight")))
    assert matrix.ndim == 2
    back = to_ldm_names(theirs)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert to_ldm_names(state).keys() == state.keys()


def test_a_diffusers_config_gives_its_network():
    config = {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    }
    net = AutoencoderKL.from_diffusers_config(config)
    assert len(net.encoder.down[1].attn) == 1 and not net.encoder.down[0].attn
    assert net.decoder.conv_out.in_channels == 32 and net.stride == 2


@torch.no_grad()
def test_chunks_change_nothing():
    vae, images = pico_vae(), torch.randn(5, 3, 32, 32)
    moments = vae.encode(images)
    assert torch.allclose(vae.encode(images, chunk=2), moments, atol=1e-5)
    z = moments[:, :4]
    assert torch.allclose(vae.decode(z, chunk=2), vae.decode(z), atol=1e-5) and vae.decode(z).shape == images.shape


def test_log_variances_are_clamped():
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([-50.0, 50.0]).view(1, 1, 1, 2)], dim=1)
    q = posterior(moments)
    assert q.logvar.flatten().tolist() == [-30, 20] and torch.equal(q.sample(torch.zeros_like(q.mean)), q.mean)
