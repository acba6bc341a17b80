"""The model behind the contract: labels, seeds, settings, codecs, files."""

import dataclasses
import json
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from core.pico import PixelMoments
from imm.tiny import BY_NAME, LATENT, VAE, latent_backbone, pixel_backbone, randomised, write_net, write_vae

from neon_core.kl_vae import AutoencoderKL, to_diffusers_names
from neon_core.synthetic import write_images
from neon_files.checkpoint import write_checkpoint
from neon_files.errors import UserError
from neon_files.image_set import ImageSet
from neon_imm.backbone import IMMBackbone
from neon_imm.commands import COMMANDS
from neon_imm.labels import create_labels, file_order, label_plan
from neon_imm.latent_set import encode_images
from neon_imm.latents import RgbCodec, VaeCodec
from neon_imm.official import official_arguments
from neon_imm.precond import IMMPrecond
from neon_imm.vae_files import SD_VAE_CONFIG, load_vae
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference
from neon_metrics.scores import inception_score
from neon_run.commands import chosen_seeds
from neon_run.stages import Model, calculate_fid

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> IMMBackbone:
    return latent_backbone(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def pixel(tmp_path_factory) -> IMMBackbone:
    return pixel_backbone(tmp_path_factory.mktemp("pixel"))


def test_an_image_is_redrawn_by_the_autoencoder_and_a_model_of_pixels_has_none(latent, pixel):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = latent.through_tokenizer(images)
    mean = latent.codec.moments(images)[:, :4]
    expected = (latent.codec.vae.decode(mean) + 1) * 127.5
    assert again.shape == images.shape and (again.float() - expected.clamp(0, 255)).abs().max() < 1.01
    assert pixel.through_tokenizer(images[..., :8, :8]) is None


# Sampling


@pytest.mark.parametrize("settings", [{"num_steps": 2, "cfg": 1.8}, {"num_steps": 3, "sampler": "restart"}])
def test_an_image_depends_on_its_seed_and_label_alone(latent, settings):
    seeds, labels = [5, 0, 77, 3], torch.tensor([1, 2, 3, 4])
    together = latent.sample(seeds, labels, **settings)
    assert together.dtype == torch.uint8 and together.shape == (4, 3, 32, 32)
    for i in (0, 2):
        alone = latent.sample(seeds[i : i + 1], labels[i : i + 1], **settings)
        assert (
            alone[0].int() - together[i].int()
        ).abs().max() <= 1  # a matrix product of another size rounds otherwise
    assert (together[0].int() - together[1].int()).abs().max() > 10


def test_labels_and_guidance_change_the_image(latent):
    a, b = (latent.sample([1], torch.tensor([k]), num_steps=1) for k in (0, 1))
    c = latent.sample([1], torch.tensor([0]), num_steps=1, cfg=3.0)
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_a_pixel_model_needs_neither_labels_nor_autoencoder(pixel):
    assert pixel.num_classes == 0 and pixel.img_size == 8 and pixel.assign_labels([1, 2]) is None
    images = pixel.sample([1, 2], None, discretization="mid_nt", mid_nt=(1.4,), cfg=None)
    assert images.shape == (2, 3, 8, 8) and pixel.prepared_key == ""


def test_float64_state_changes_rounding_only(latent):
    labels = torch.tensor([1, 2])
    a, b = (latent.sample([1, 2], labels, num_steps=4, cfg=1.5, state=state) for state in ("float32", "float64"))
    assert (a.int() - b.int()).abs().max() < 1.01


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"cfg": float("nan")}, "cfg"),
        ({"sampler": "heun"}, "pushforward"),
        ({"discretization": "linear"}, "uniform"),
        ({"precision": "fp8"}, "bf16"),
        ({"state": "half"}, "float64"),
        ({"label_rule": "random"}, "balanced"),
        ({"discretization": "mid_nt", "mid_nt": (0.0,)}, "above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(latent, settings, word):
    with pytest.raises(UserError, match=word):
        latent.check_settings(**settings)


def test_guidance_of_an_unconditional_model_is_an_error(pixel):
    with pytest.raises(UserError, match="has no classes"):
        pixel.check_network(cfg=1.5)


# Labels


@pytest.mark.parametrize("num_images, counts", [(12, [3, 3, 3, 3]), (10, [3, 3, 2, 2]), (3, [1, 1, 1, 0])])
def test_classes_come_in_order_and_the_lowest_take_the_remainder(num_images, counts):
    labels = label_plan(num_images, 4)
    assert torch.bincount(labels, minlength=4).tolist() == counts
    assert labels.tolist() == sorted(labels.tolist())


def test_files_are_read_in_the_order_of_their_names_as_text():
    labels = label_plan(2 * 201, 201)
    read = labels[file_order(labels)].tolist()[::2]
    assert read[:17] == [0, *range(100, 110), 10, *range(110, 115)] and read[-1] == 9
    assert read.index(19) + 1 == read.index(1) == read.index(200) - 1
    assert file_order(labels)[:4].tolist() == [0, 1, 200, 201]  # within a class by number
    assert file_order(torch.tensor([10, 1, 0, 1])).tolist() == [2, 0, 1, 3]


def test_inception_score_has_the_parts_of_the_official_script(tmp_path):
    backbone = latent_backbone(tmp_path, label_dim=12, num_classes=12)
    detector = PixelMoments()
    reference = Reference(np.zeros(12), np.eye(12), "none")
    evaluator = Evaluator(reference, metrics=["is"], detector=detector, device=CPU)
    settings, seeds = {"num_steps": 1}, range(24)
    row = dataclasses.replace(BY_NAME["imagenet_256"], evaluate=settings, batch_size=5)
    model = Model(row, tmp_path / "dit.safetensors", CPU, frozen={"vae": tmp_path / "vae.safetensors"})
    found = calculate_fid(model, evaluator, seeds)
    labels = backbone.assign_labels(seeds, **settings)
    logits = detector(backbone.sample(seeds, labels, **settings))["logits"]
    expected, by_index = inception_score(logits[file_order(labels)]), inception_score(logits)
    assert (found["is_mean"], found["is_std"]) == pytest.approx(expected, rel=1e-6)
    assert found["is_std"] != pytest.approx(by_index[1], rel=1e-3)


def test_balanced_labels_stay_when_the_list_grows(latent):
    short, long = (
        latent.assign_labels(range(15), label_rule="balanced"),
        latent.assign_labels(range(40), label_rule="balanced"),
    )
    assert torch.equal(short, long[:15]) and torch.bincount(long).tolist() == [4] * 10


def test_labels_are_read_from_the_released_file_names(tmp_path):
    for name in ("label3_000000.png", "LABEL12_000001.PNG", "sample_000002.png", "notlabel1_0.png"):
        (tmp_path / name).touch()
    expected = [["LABEL12_000001.PNG", 12], ["label3_000000.png", 3]]
    assert create_labels(tmp_path)["labels"] == expected
    text = (tmp_path / "dataset.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"labels": expected} and not text.endswith("\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="label7_000012"):
        create_labels(tmp_path / "empty")


# Files


def test_a_pickle_with_omegaconf_inside_is_read_without_it(golden_data):
    backbone = IMMBackbone.load(golden_data / "imm" / "imm_tiny_songunet.pkl", CPU, **BY_NAME["cifar10"].load)
    assert not {"omegaconf", "torch_utils", "hydra"} & set(sys.modules)
    assert backbone.net.model.noise_channels == 8 and backbone.num_classes == 3
    images = backbone.sample([0, 1], torch.tensor([0, 2]), num_steps=1, cfg=1.5)
    assert images.shape == (2, 3, 8, 8)


def test_what_is_written_is_read_back_with_codec_and_loss(tmp_path):
    latent_backbone(tmp_path)
    vae = tmp_path / "vae.safetensors"
    backbone = IMMBackbone.load(tmp_path / "dit.safetensors", CPU, vae=vae, k=9, matrix_size=2)
    path = tmp_path / "again.safetensors"
    write_checkpoint(path, backbone.net.state_dict(), config=backbone.network_config())
    again = IMMBackbone.load(path, CPU, **BY_NAME["cifar10"].load, vae=vae)
    assert again.loss == backbone.loss and again.loss.k == 9 and again.loss.a == 2.0
    assert again.micro_batch_multiple == 2
    assert isinstance(again.codec, VaeCodec) and again.prepared_key == backbone.prepared_key
    for name, value in backbone.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])


def test_a_bare_state_dict_is_taken_for_the_rows_network(tmp_path):
    write_checkpoint(tmp_path / "bare.safetensors", randomised(IMMPrecond(**LATENT)).state_dict())
    with pytest.raises(UserError, match="IMMPrecond"):  # not the network of the row, and told so
        IMMBackbone.load(
            tmp_path / "bare.safetensors", CPU, **BY_NAME["imagenet_256"].load, vae=write_vae(tmp_path / "v.pt")
        )


def test_an_autoencoder_of_other_channels_is_refused(tmp_path):
    net, vae = write_net(tmp_path / "net.safetensors", LATENT), write_vae(tmp_path / "vae.safetensors", embed_dim=8)
    with pytest.raises(UserError, match="8 channels"):
        IMMBackbone.load(net, CPU, **BY_NAME["imagenet_256"].load, vae=vae)


@pytest.mark.parametrize("spelling", ["current", "legacy", "ldm"])
def test_the_autoencoder_is_read_in_three_spellings(tmp_path, spelling):
    config = {**SD_VAE_CONFIG, "block_out_channels": [32, 64], "layers_per_block": 1}
    config["down_block_types"] = config["down_block_types"][:2]
    vae = randomised(AutoencoderKL.from_diffusers_config(config)).eval()
    state = vae.state_dict()
    if spelling != "ldm":
        state = to_diffusers_names(state, legacy=spelling == "legacy")
    write_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(load_vae(tmp_path).decode(z), vae.decode(z))


def test_a_vae_that_cannot_be_fetched_is_one_clear_error(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network, and not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"sd-vae-ft-ema.*download_models.sh imm"):
        load_vae()
    with pytest.raises(UserError, match="no such file"):
        load_vae("missing/vae.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_vae(tmp_path / "empty")


def test_the_vae_under_checkpoints_is_preferred_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "sd-vae-ft-ema"
    config = {
        **SD_VAE_CONFIG,
        "block_out_channels": [32],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"],
    }
    vae = AutoencoderKL.from_diffusers_config(config)
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", to_diffusers_names(vae.state_dict()))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_vae().config["ch"] == 32


# From images to the loss


def test_moments_are_the_same_from_images_and_from_the_zip(tmp_path):
    backbone = latent_backbone(tmp_path)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"label{k}_{i:06d}.png" for i, k in enumerate([0, 0, 1, 1, 2, 9])]
    write_images(tmp_path / "set", names, pixels)
    create_labels(tmp_path / "set")
    assert encode_images(tmp_path / "set", tmp_path / "set.zip", backbone.codec, CPU, batch_size=4) == 6
    images, latents = ImageSet(tmp_path / "set"), ImageSet(tmp_path / "set.zip")
    assert latents.class_indices.tolist() == images.class_indices.tolist() == [0, 0, 1, 1, 2, 9]
    items = np.arange(6)
    torch.testing.assert_close(backbone.prepare(images.images(items)), latents.images(items), rtol=1e-4, atol=1e-4)
    key = backbone.prepared_key
    backbone.check_set(images)
    assert backbone.prepared_key == key
    backbone.check_set(latents)
    assert backbone.prepared_key == ""  # moments need no cache
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.namelist()[0] == "00000/img-mean-std-00000000.npy"


def test_latents_are_drawn_anew_and_scaled(latent):
    moments = torch.cat([torch.full([1, 4, 8, 8], 2.0), torch.full([1, 4, 8, 8], 0.5)], dim=1).repeat(500, 1, 1, 1)
    z = latent.encode(moments, torch.Generator().manual_seed(0))
    codec = latent.codec
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), 2.0 * codec.scale + codec.bias, rtol=0.01, atol=0.01)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), 0.5 * codec.scale, rtol=0.02, atol=0)
    assert not torch.equal(z, latent.encode(moments, torch.Generator().manual_seed(1)))


def test_pixels_survive_the_way_through_the_pixel_codec():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(RgbCodec(1).decode(RgbCodec(1).moments(pixels)), pixels)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8)])
def test_a_set_of_another_size_is_named(tmp_path, pixel, shape):
    write_images(tmp_path, ["a.png"], torch.zeros((1, *shape), dtype=torch.uint8))
    with pytest.raises(UserError, match=r"this model takes"):
        pixel.check_set(ImageSet(tmp_path))


def test_images_that_the_autoencoder_cannot_halve_are_named(tmp_path):
    write_images(tmp_path / "s", ["a.png"], torch.zeros((1, 3, 30, 30), dtype=torch.uint8))
    vae = AutoencoderKL(**VAE)
    with pytest.raises(UserError, match="4 divides"):
        encode_images(tmp_path / "s", tmp_path / "s.zip", VaeCodec(vae, factor=vae.stride), CPU)
    assert not (tmp_path / "s.zip").exists()


# Flags


def test_flags_win_over_the_official_preset_and_that_over_the_row():
    official = "8_steps_cfg1.5_pushforward_uniform"

    def settings(preset: str, stage: str = "evaluate", **flags) -> dict:
        return COMMANDS.sampler_settings({**getattr(COMMANDS.find_row(preset, None), stage), **flags}, flags)

    balanced = {"label_rule": "balanced"}
    assert settings("imagenet_256") == {"num_steps": 8, "cfg": 1.8, **balanced}
    assert settings("imagenet_256", "generate") == {"num_steps": 8, "cfg": 1.5}
    assert settings(official) == {"num_steps": 8, "cfg": 1.5, **balanced}
    assert settings(official, "generate") == {"num_steps": 8, "cfg": 1.5}
    assert settings(official, cfg=1.8, num_steps=2) == {"num_steps": 2, "cfg": 1.8, **balanced}
    assert settings(official, cfg="none", label_rule="in_order") == {
        "num_steps": 8, "cfg": None, "label_rule": "in_order",
    }  # fmt: skip
    assert settings("2_step")["mid_nt"] == (1.4,)
    with pytest.raises(UserError, match="num_steps"):
        settings("2_step", num_steps=2)
    with pytest.raises(UserError, match="discretization"):
        settings(official, mid_nt=[1.4])
    assert COMMANDS.find_row(official, None).id == "imm/imagenet_256"
    assert COMMANDS.find_row("1_step", None).id == "imm/cifar10"
    with pytest.raises(UserError, match=r"--preset imagenet: .*imagenet_256_t4"):
        COMMANDS.find_row("imagenet", None)


def test_how_many_images_is_said_once():
    def seeds(default: int, num_classes: int, **flags) -> list[int]:
        values = {"num_images": None, "per_class": None, "seed": None, "seeds": None} | flags
        return list(chosen_seeds(COMMANDS, values, range(default), num_classes))

    assert seeds(7, 10) == list(range(7))
    assert seeds(7, 10, num_images=3, seed=5) == [5, 6, 7]
    assert len(seeds(7, 10, per_class=3)) == 30
    assert seeds(7, 10, seeds=[4, 2]) == [4, 2]
    with pytest.raises(UserError, match="one of them"):
        seeds(7, 10, num_images=5, per_class=3)
    with pytest.raises(UserError, match="per_class"):
        seeds(7, 0, per_class=3)


def test_the_official_arguments_are_translated():
    given = (
        "--config-name=im256_generate_images.yaml eval.resume=a.pkl +per_class_count=50 +fid_stats=b.npz +cfg_scale=1.8"
    )
    assert official_arguments("calculate_fid", given.split()) == [
        "--model_ckpt=a.pkl", "--per_class=50", "--fid_stats=b.npz", "--cfg=1.8",
    ]  # fmt: skip
    ours = ["--model_ckpt", "runs/k=3/a.pkl", "--cfg=1.8"]
    assert official_arguments("generate", ours) == ours
    assert official_arguments("generate", ["out_dir=S"]) == ["--outdir=S"]
    assert official_arguments("finetune", ["training.transfer=a.pkl", "dataset.path=S"]) == ["--base=a.pkl", "--data=S"]
    assert official_arguments("sweep", ["+aux_resume=b.pkl", "+neon_w=2"]) == ["--synthetic=b.pkl", "--w=2"]
    assert official_arguments("generate", ["eval.cudnn_benchmark=true"]) == []


@pytest.mark.parametrize(
    ("stage", "word", "flag"),
    [("generate", "eval.seed=3", "--seed"), ("calculate_fid", "+fid_out=fid.txt", "--json"),
     ("finetune", "outputdir=o", "--outdir"), ("finetune", "training.total_ticks=60", "--images"),
     ("sweep", "+per_class_count=10", "--num_images"), ("generate", "encoder.vae_name=x", "--vae"),
     ("generate", "dataset.path=S", "eval.resume")],
)  # fmt: skip
def test_official_words_that_are_not_understood_are_refused_with_our_flag(stage, word, flag):
    with pytest.raises(UserError, match=f"{re.escape(word)}: .*{flag}"):
        official_arguments(stage, [word])
