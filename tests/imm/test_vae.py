"""The autoencoder against diffusers itself, where that is installed, and its key names against the published table."""

import json

import pytest
import torch
from imm.tiny import randomised

from neon_core.kl_vae import AutoencoderKL, posterior, to_diffusers_names, to_ldm_names

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
}


def test_encode_and_decode_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="a test-only dependency; golden case `vae` holds its numbers")
    theirs = randomised(diffusers.AutoencoderKL(**CONFIG)).eval()
    ours = AutoencoderKL.from_diffusers_config(CONFIG).eval()
    ours.load_state_dict(to_ldm_names(theirs.state_dict()))
    generator = torch.Generator().manual_seed(0)
    z, images = torch.randn(2, 4, 4, 4, generator=generator), torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=2e-5)
        found, expected = posterior(ours.encode(images)), theirs.encode(images).latent_dist
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.std, expected.std, rtol=1e-4, atol=2e-5)


def test_the_published_key_table_is_followed_in_every_direction(golden_data):
    table = json.loads((golden_data / "imm" / "vae_key_map.json").read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert len(rows) == 248
    for spelling in ("diffusers_current", "diffusers_published_file"):
        theirs = {row[spelling]: torch.empty(row["shape_diffusers"], device="meta") for row in rows}
        ours = {name: list(value.shape) for name, value in to_ldm_names(theirs).items()}
        assert ours == {row["ldm"]: row["shape_ldm"] for row in rows}
    native = {row["ldm"]: torch.empty(row["shape_ldm"], device="meta") for row in rows}
    for legacy, spelling in ((False, "diffusers_current"), (True, "diffusers_published_file")):
        back = to_diffusers_names(native, legacy=legacy)
        assert {k: list(v.shape) for k, v in back.items()} == {row[spelling]: row["shape_diffusers"] for row in rows}
    with torch.device("meta"):
        full = AutoencoderKL.from_diffusers_config(table["config"]).state_dict()
    assert {k: list(v.shape) for k, v in full.items()} == {row["ldm"]: row["shape_ldm"] for row in rows}
