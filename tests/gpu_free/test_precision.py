"""The precision of network and decoder: the original's by default, the same in every record, and refused where the
device lacks it."""

import pytest
import torch
from gpu_free.fake_cuda import GPU, fake_cuda
from gpu_free.published import ROWS
from imm.tiny import latent_backbone
from var.tiny import tiny_backbone
from xar.pico import pico_net, pico_vae

from neon_files.errors import UserError
from neon_run import stages
from neon_run.commands import chosen_row
from neon_var.commands import COMMANDS
from neon_xar.backbone import XARBackbone

HALF = {"network": "fp16", "decoder": "fp16"}
FULL = {"network": "fp32", "decoder": "fp32"}
EDM = {"network": "fp32"}
# What the official scripts do on a GPU: for S, for the FID, and where float32 is TF32 in either.
OFFICIAL = {
    "var/imagenet_256": (FULL, HALF, "conv", "all"),
    "var/imagenet_512": (FULL, HALF, "conv", "all"),
    "xar/xar_base": (HALF, HALF, "all", "all"),
    "xar/xar_large": (HALF, HALF, "all", "all"),
    "xar/xar_huge": (HALF, HALF, "all", "all"),
    "edm/cifar10_cond": (EDM, EDM, "conv", "conv"),
    "edm/cifar10_uncond": (EDM, EDM, "conv", "conv"),
    "edm/ffhq64": (EDM, EDM, "conv", "conv"),
    "imm/imagenet_256": ({"network": "fp32", "decoder": "fp16"},) * 2 + ("all", "all"),
    "imm/cifar10": ({"network": "fp32"},) * 2 + ("all", "all"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_default_of_every_row_is_the_originals(name):
    row = ROWS[name].row
    with fake_cuda():
        backbone = ROWS[name].build()
        computed = [backbone.precisions(**settings) for settings in (row.generate, row.evaluate)]
    assert (*computed, row.generate_tf32 or row.tf32, row.tf32) == OFFICIAL[name]


@pytest.fixture(params=["var", "xar", "imm"])
def decoding(request, tmp_path):
    """(backbone, its autoencoder, settings) of a tiny network with a decoder."""
    if request.param == "var":
        backbone = tiny_backbone()
        return backbone, backbone.vae, {"cfg": 2.0, "top_k": 30}
    if request.param == "xar":
        backbone = XARBackbone(pico_net(), pico_vae())
        return backbone, backbone.autoencoder, {"cfg": 2.0, "flow_steps": 3}
    backbone = latent_backbone(tmp_path)
    return backbone, backbone.codec.vae, {"num_steps": 1}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_decoder_has_a_precision_of_its_own(decoding, precision):
    backbone, autoencoder, settings = decoding
    seen, weights = [], autoencoder.decoder.conv_out.weight
    autoencoder.decoder.conv_out.register_forward_hook(
        lambda module, inputs, output: seen.append((module.weight.dtype, output.dtype))
    )
    labels = torch.tensor([1, 2])
    exact = backbone.sample([0, 1], labels, **settings)
    half = backbone.sample([0, 1], labels, **settings, decoder_precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert seen == [(torch.float32, torch.float32), (dtype, dtype)]  # its weights are held in half precision
    assert weights.dtype == torch.float32  # and are as before afterwards
    difference = (exact.int() - half.int()).abs().float()
    assert 0 < difference.mean() < 3  # the network made the same latents
    used = backbone.precisions(**settings, decoder_precision=precision)
    assert used == {"network": "fp32", "decoder": precision}
    with pytest.raises(UserError, match="--decoder_precision fp8: choose auto, fp32, fp16, bf16"):
        backbone.check_settings(decoder_precision="fp8")


@pytest.mark.parametrize("flag", ["precision", "decoder_precision"])
def test_bfloat16_is_refused_on_a_gpu_without_it_before_anything_is_loaded(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    model = stages.Model(ROWS["var/imagenet_256"].row, tmp_path / "not there", GPU)
    stages.check_settings(model, {flag: "fp16"})
    with pytest.raises(UserError) as error:
        stages.check_settings(model, {flag: "bf16"})
    assert error.value.message == (
        f"--{flag} bf16: this GPU (Tesla V100) does not compute bfloat16; choose fp16 or fp32"
    )


def test_a_reduced_precision_is_in_the_records_of_sets_and_results():
    model = stages.Model(ROWS["var/imagenet_256"].row, None, torch.device("cpu"))
    model.__dict__["backbone"] = tiny_backbone()
    assert stages.reduced_precision(model, {"precision": "auto"}) == {}
    record = stages.reduced_precision(model, {"precision": "bf16"})
    assert record == {"computed_in": {"network": "bf16", "decoder": "bf16"}}
    record = stages.reduced_precision(model, {"precision": "bf16", "decoder_precision": "fp32"})
    assert record == {"computed_in": {"network": "bf16", "decoder": "fp32"}}


def test_a_model_of_pixels_has_no_decoder():
    with fake_cuda():
        backbone = ROWS["imm/cifar10"].build()
        backbone.check_network(decoder_precision="auto")
        with pytest.raises(UserError, match=r"--decoder_precision bf16: .* has no decoder; leave it out"):
            backbone.check_network(decoder_precision="bf16")


def test_auto_on_the_command_line_leaves_the_precision_to_the_row():
    (s_flag,) = (option for option in COMMANDS.sample if option.name == "precision")
    values = {option.name: None for option in COMMANDS.sample} | {"preset": "imagenet_256", "batch_size": None}
    for word, tf32, settings, places in (
        ("auto", None, {"precision": "fp32"}, "conv"),
        ("fp16", True, {"precision": "fp16"}, "all"),
    ):
        given = {**values, "precision": s_flag.callback(None, s_flag, word), "tf32": tf32}
        row = chosen_row(COMMANDS, None, given, "generate")
        assert (row.generate | settings, row.generate_tf32) == (row.generate, places)
        row = chosen_row(COMMANDS, None, given, "evaluate")
        assert row.evaluate.get("precision") == (None if word == "auto" else word)
