"""xAR behind the contract: labels, prepared moments, loading and what is refused."""

import numpy as np
import pytest
import torch
from xar.pico import NET, pico_net, pico_vae, write_pico

from neon_core.kl_vae import AutoencoderKL, to_diffusers_names
from neon_files.checkpoint import load_strict, read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_run.commands import common_training
from neon_xar.backbone import XARBackbone, load_autoencoder
from neon_xar.rows import ROWS
from neon_xar.vae import SCALE, both_moments, from_uint8
from neon_xar.xar import NULL_CLASS

CPU = torch.device("cpu")


@pytest.fixture
def backbone():
    return XARBackbone(pico_net(), pico_vae())


def load(checkpoint, vae, **options):
    return XARBackbone.load(checkpoint, CPU, vae_path=vae, **{"model": "xar_base", **options})


@pytest.mark.parametrize("count", [3, 10, 37])
def test_labels_are_balanced_to_within_one_image_for_any_number(backbone, count):
    labels = backbone.assign_labels(range(1_000_000, 1_000_000 + count))
    counts = np.bincount(labels, minlength=10)
    assert len(labels) == count and counts.max() - counts.min() <= 1
    assert torch.equal(backbone.assign_labels(range(1_000_000, 1_000_003)), labels[:3])  # an image keeps its class


def test_the_official_label_list_is_refused_where_it_would_pad(backbone):
    assert backbone.assign_labels(range(20), label_rule="official").tolist() == sorted([*range(10), *range(10)])
    with pytest.raises(UserError, match="--labels official: 23 images are not a multiple of 10"):
        backbone.assign_labels(range(23), label_rule="official")


def test_prepared_moments_hold_the_image_and_its_mirror_image(backbone):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    moments = backbone.prepare(images)
    assert moments.shape == (3, 2, 8, 16, 16)
    mirrored = both_moments(backbone.autoencoder, images.flip(-1))
    assert torch.allclose(moments[:, 1], mirrored[:, 0], atol=1e-6)
    assert torch.allclose(moments[:, 0], backbone.autoencoder.encode(from_uint8(images)), atol=1e-6)


def test_an_image_is_redrawn_from_the_mean_of_its_posterior(backbone):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = backbone.through_tokenizer(images)
    mean = backbone.autoencoder.encode(from_uint8(images))[:, :4]
    expected = (backbone.autoencoder.decode(mean) + 1) * 127.5
    assert again.shape == images.shape and (again.float() - expected.clamp(0, 255)).abs().max() < 1.01


def test_images_of_another_size_are_cropped_and_grey_ones_repeated(backbone):
    assert backbone.prepare(torch.zeros(2, 1, 48, 70, dtype=torch.uint8)).shape == (2, 2, 8, 16, 16)


def test_encoding_takes_either_flip_and_scales_a_posterior_sample(backbone):
    moments = torch.zeros(200, 2, 8, 16, 16)
    moments[:, 0, :4], moments[:, 1, :4], moments[:, :, 4:] = 1.0, -1.0, -30.0
    latents = backbone.encode(moments, torch.Generator().manual_seed(0))
    assert latents.shape == (200, 4, 16, 16)
    assert torch.allclose(latents.abs(), torch.full_like(latents, SCALE), atol=1e-4)
    mirrored = (latents[:, 0, 0, 0] < 0).float().mean().item()
    assert 0.35 < mirrored < 0.65
    again = backbone.encode(moments, torch.Generator().manual_seed(0))
    assert torch.equal(latents, again)
    backbone.flip = False
    assert (backbone.encode(moments, torch.Generator().manual_seed(0)) > 0).all()


def test_the_loss_is_a_function_of_the_generator_and_drops_labels(backbone):
    x, labels, seen = torch.randn(64, 4, 16, 16), torch.zeros(64, dtype=torch.int64), []
    backbone.net.class_emb.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    one, two = (backbone.self_training_loss(x, labels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two and one.ndim == 0
    assert one != backbone.self_training_loss(x, labels, torch.Generator().manual_seed(4))
    assert 0 < (torch.cat(seen) == NULL_CLASS).float().mean() < 0.25


def test_biases_and_norms_are_not_decayed_and_come_first(backbone):
    plain, decayed = backbone.parameter_groups(0.02)
    assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"])
    assert decayed["weight_decay"] == 0.02 and all(p.ndim >= 2 for p in decayed["params"])
    embeddings = (backbone.net.class_emb.weight, backbone.net.encoder_pos_embed_learned)
    assert all(any(p is e for p in decayed["params"]) for e in embeddings)
    assert len(plain["params"]) + len(decayed["params"]) == len(list(backbone.net.parameters()))


@pytest.mark.parametrize("nesting", ["flat", "model_ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_published_nesting_loads(tmp_path, nesting, prefix):
    net = pico_net(seed=5)
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save(state if nesting == "flat" else {nesting: state, "epoch": 3}, tmp_path / "file.pth")
    found, twin = read_checkpoint(tmp_path / "file.pth"), pico_net()
    load_strict(twin, found)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("spelling", ["ldm", "diffusers", "legacy", "with a loss network"])
def test_autoencoders_load_in_every_spelling(tmp_path, spelling):
    vae = pico_vae(seed=4)
    state = vae.state_dict()
    if spelling in ("diffusers", "legacy"):
        state = to_diffusers_names(state, legacy=spelling == "legacy")
    if spelling == "with a loss network":
        state = {**state, "loss.logvar": torch.zeros(1)}
    write_checkpoint(tmp_path / "vae.ckpt", state, {"class": "AutoencoderKL", "kwargs": vae.config})
    found, name = load_autoencoder(tmp_path / "vae.ckpt", CPU)
    images = torch.rand(1, 3, 32, 32)
    assert torch.allclose(found.encode(images), vae.encode(images), atol=1e-6)
    write_pico(tmp_path)
    assert name != load_autoencoder(tmp_path / "vae.ckpt", CPU)[1]  # other weights, other cache of moments


def test_missing_files_are_named(tmp_path):
    base, vae = write_pico(tmp_path)
    with pytest.raises(UserError, match=r"nope.pth: does not exist"):
        load(tmp_path / "nope.pth", vae)
    with pytest.raises(UserError, match=r"nope.ckpt: does not exist"):
        load(base, tmp_path / "nope.ckpt")


def test_an_autoencoder_of_another_shape_is_refused_by_name(tmp_path):
    base, _ = write_pico(tmp_path)
    torch.save({"model": pico_vae().state_dict()}, tmp_path / "tiny.ckpt")  # no configuration: must be KL-16
    with pytest.raises(UserError, match=r"--vae_path .*tiny.ckpt: does not fit AutoencoderKL: .*; use kl16.ckpt"):
        load(base, tmp_path / "tiny.ckpt")
    wide = AutoencoderKL(embed_dim=8, ch=8, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), norm_groups=4)
    write_checkpoint(tmp_path / "wide.ckpt", wide.state_dict(), {"class": "AutoencoderKL", "kwargs": wide.config})
    with pytest.raises(UserError, match="8 latent channels and stride 2, the transformer requires 4 and 2"):
        load(base, tmp_path / "wide.ckpt")
    with pytest.raises(UserError, match="holds a XAR, not an autoencoder"):
        load(base, base)


def test_weights_of_another_size_name_the_size_that_fits(tmp_path):
    _, vae = write_pico(tmp_path)
    torch.save({"encoder_pos_embed_learned": torch.zeros(1, 256, 1024)}, tmp_path / "large.pth")
    with pytest.raises(UserError, match="not xar_base weights: width 1024 instead of 768; give --model xar_large"):
        load(tmp_path / "large.pth", vae)
    with pytest.raises(UserError, match="missing in the file"):
        load(tmp_path / "large.pth", vae, model="xar_large")
    with pytest.raises(UserError, match="xar_giant: no such model; choose one of xar_base, xar_large, xar_huge"):
        load(tmp_path / "large.pth", vae, model="xar_giant")
    write_checkpoint(tmp_path / "x.pth", {"a": torch.zeros(1)}, {"class": "XAR", "kwargs": {"img_size": 100}})
    with pytest.raises(UserError, match=r"x.pth: its configuration is not one of XAR \(img_size 100"):
        load(tmp_path / "x.pth", vae)
    write_checkpoint(tmp_path / "x.pth", {"a": torch.zeros(1)}, {"class": "VAR", "kwargs": {}})
    with pytest.raises(UserError, match="holds a VAR, not an xAR transformer"):
        load(tmp_path / "x.pth", vae)


def test_a_checkpoint_that_says_what_it_is_needs_no_model(tmp_path):
    base, vae = write_pico(tmp_path)
    assert XARBackbone.load(base, CPU, vae_path=vae).net.class_num == 10


def test_the_official_grids():
    large, base = (row.grid for row in ROWS[:2])
    assert (large.ws[0], large.ws[-1], large.tolerance, large.refine) == (0.8, 2.8, 0.02, 0.1)
    assert base.settings["cfg"] == (2.8, 3.0, 3.2, 3.4, 3.6, 3.8, 4.0, 4.2, 4.4, 4.6)


def test_the_rows_hold_the_papers_settings():
    large, base = ROWS[:2]
    assert (large.w, large.evaluate, large.train.images) == (1.6, {"cfg": 2.7, "flow_steps": 50}, 3_750_000)
    assert (base.w, base.evaluate, base.train.images) == (1.4, {"cfg": 3.8, "flow_steps": 40}, 4_250_000)
    train = large.train
    assert train.lr * train.schedule(3_500_000) == pytest.approx(5e-7) and train.schedule(0) == 0
    shorter = common_training(large, {"images": 1000, "ramp_images": 10, "ema_decay": 0.5})
    assert (shorter.images, shorter.lr, shorter.schedule(5), shorter.ema.decay) == (1000, 1e-6, 0.5, 0.5)


def test_dropout_of_the_fine_tune_is_in_networks_built_by_name(tmp_path):
    assert NET["attn_dropout"] == NET["proj_dropout"] == 0.1
    base, vae = write_pico(tmp_path)
    net = load(base, vae).net
    assert net.encoder_blocks[0].attn.attn_dropout == 0.1 and net.encoder_blocks[0].mlp.drop.p == 0.1
