"""Detectors by name, and `neon fid IMAGES` and `neon reference IMAGES`, which use them."""

import builtins
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from neon_core.synthetic import write_png
from neon_files.errors import UserError
from neon_metrics import Reference, detectors, fid_from_features, load_reference, write_reference
from neon_metrics.detectors import DinoV2Detector, NetworkDetector, open_detector
from neon_run.command import neon

timm = pytest.importorskip("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")


def small_dinov2():
    """DINOv2's form, 2 blocks of width 24, with random weights, at its own 518 pixels: 37 x 37 places."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = vision_transformer.VisionTransformer(
            img_size=518, patch_size=14, embed_dim=24, depth=2, num_heads=2, init_values=1.0, num_classes=0
        )
        torch.nn.init.normal_(net.pos_embed)
        for block in net.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)  # places are to matter
    return net.eval()


def pictures(count, size=30, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def cubic(x):
    """Keys' kernel with a = -0.75, as torch's bicubic."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(old=37, new=16):
    """[new, old]: bicubic without antialias; place i looks at (i + 1/2) / (16.1 / 37) - 1/2, edges repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / 16.1 - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(centre - j)
    return matrix


def plain_dinov2(net, images):
    """The features written plainly, float64: preparation, tokens with positions, blocks, norm, class token."""
    net = net.double()
    x = functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).double() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / deviation[:, None, None]
    tokens = functional.conv2d(x, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=14)
    table = net.pos_embed[0]
    r = resampling()
    places = torch.einsum("yi,xj,ijd->yxd", r, r, table[1:].reshape(37, 37, -1)).reshape(256, -1)
    x = tokens.flatten(2).transpose(1, 2) + places
    x = torch.cat([(net.cls_token + table[:1]).expand(len(x), -1, -1), x], 1)
    for block in net.blocks:
        h = functional.layer_norm(x, [24], block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).view(len(x), 257, 3, 2, 12).permute(2, 0, 3, 1, 4)
        h = ((q @ k.transpose(-1, -2)) / 12**0.5).softmax(-1) @ v
        x = x + block.ls1.gamma * block.attn.proj(h.transpose(1, 2).reshape(len(x), 257, 24))
        h = functional.layer_norm(x, [24], block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + block.ls2.gamma * block.mlp.fc2(functional.gelu(block.mlp.fc1(h)))
    return functional.layer_norm(x, [24], net.norm.weight, net.norm.bias, 1e-6)[:, 0]


@torch.no_grad()
def test_dinov2_is_the_class_token_of_the_original_preparation_and_positions():
    images = pictures(3)
    detector = DinoV2Detector(small_dinov2(), "small dinov2", chunk_images=2)
    assert detector.num_features == 24 and not detector.official
    expected = plain_dinov2(small_dinov2(), images)
    torch.testing.assert_close(detector(images)["features"].double(), expected, rtol=1e-3, atol=1e-3)
    by_timm = small_dinov2()
    by_timm.set_input_size(img_size=224)  # whose own resampling antialiases
    other = by_timm.forward_features(detector.prepared(images))[:, 0]
    assert (other - expected).abs().max() > 0.05, "the trap: these features are of no published reference"


def test_grey_images_count_as_colour_and_the_batch_does_not_matter():
    detector = NetworkDetector(torch.nn.Flatten(), "pixels", side=4)
    grey = pictures(5, channels=1)
    torch.testing.assert_close(detector(grey)["features"], detector(grey.expand(-1, 3, -1, -1))["features"])
    one_by_one = torch.cat([detector(image[None])["features"] for image in grey])
    torch.testing.assert_close(detector(grey)["features"], one_by_one)


def test_a_name_is_a_network_of_timm_with_its_own_preparation(monkeypatch):
    asked = []
    create = timm.create_model

    def create_without_weights(name, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_without_weights)
    detector = open_detector("timm:test_byobnet")
    assert asked == [("test_byobnet", True)]
    config = create("test_byobnet").pretrained_cfg
    assert detector.name == "timm:test_byobnet" and detector.side == config["input_size"][-1]
    images = pictures(2, size=detector.side)
    expected = (images / 255 - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    torch.testing.assert_close(detector.prepared(images), expected)
    assert detector(images)["features"].shape == (2, detector.num_features)


def test_what_cannot_be_had_is_said_in_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--detector timm:no_such: no_such cannot be loaded .*list_models"):
        open_detector("timm:no_such")
    offline = OSError("we are off line\nand so on")
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: (_ for _ in ()).throw(offline))
    with pytest.raises(UserError, match=r"--detector dinov2: vit_large.* cannot be loaded .*off line") as error:
        open_detector("dinov2")
    assert "\n" not in error.value.message
    kept = builtins.__import__
    absent = ImportError("no timm")
    monkeypatch.setattr(
        builtins, "__import__",
        lambda name, *rest: (_ for _ in ()).throw(absent) if name == "timm" else kept(name, *rest),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"needs the package timm; install it with .*\[detectors\]"):
        open_detector("dinov2")
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        open_detector(tmp_path / "gone.pth")


# The commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 images, in the current folder; the detectors are the pixels of a small picture."""
    monkeypatch.chdir(tmp_path)

    def opened(name, device="cpu"):
        return NetworkDetector(torch.nn.Flatten(), f"pixels {name}", side=3, chunk_images=7)

    for module in ("neon_metrics.evaluate", "neon_run.image_commands"):
        monkeypatch.setattr(f"{module}.open_detector", opened)
    for number, image in enumerate(pictures(40, size=12)):
        write_png(tmp_path / "photos" / f"{number:02d}.png", image)
    return tmp_path


def run(*words, status=0):
    result = CliRunner().invoke(neon, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split()) if status else result.stdout


def test_reference_and_distance_of_a_folder_and_of_a_zip(folder):
    said = run("reference", "photos", "-o", "ref.npz", "--device", "cpu")
    assert "40 images | pixels None | 27 features" in said
    features = NetworkDetector(torch.nn.Flatten(), "pixels", side=3)(pictures(40, size=12))["features"].double()
    reference = load_reference("ref.npz")
    np.testing.assert_allclose(reference.mu, features.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reference.sigma, features.T.cov(), rtol=1e-4, atol=1e-6)
    with zipfile.ZipFile("others.zip", "w") as archive:
        for number, image in enumerate(pictures(30, size=12, seed=1)):
            write_png(folder / "other.png", image)
            archive.write("other.png", f"{number}.png")
    line = run("fid", "others.zip", "--ref", "ref.npz", "--device", "cpu", "--json", "out.json", "--batch_size", 8)
    result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    others = NetworkDetector(torch.nn.Flatten(), "pixels", side=3)(pictures(30, size=12, seed=1))["features"]
    assert result["fid"] == pytest.approx(
        fid_from_features(others, Reference(features.mean(0).numpy(), features.T.cov().numpy())), rel=1e-4
    )
    assert result["num_images"] == 30 and f"FID={result['fid']:.4f}" in line and "detector=pixels" in line
    assert float(run("fid", "photos", "--ref", "ref.npz", "--metrics", "fid", "--device", "cpu")[4:].split()[0]) < 1e-3


def test_statistics_of_another_detector_are_refused(folder):
    write_reference("mine.npz", Reference(np.zeros(27), np.eye(27), detector="another"))
    message = run("fid", "photos", "--ref", "mine.npz", "--device", "cpu", status=2)
    assert "mine.npz: made with the detector another, not pixels" in message
    write_reference("mine.npz", Reference(np.zeros(5), np.eye(5)))
    assert "made from 5 features" in run("fid", "photos", "--ref", "mine.npz", "--device", "cpu", status=2)
    assert load_reference("mine.npz").detector == ""


def test_a_name_that_is_a_row_and_a_folder_is_refused_and_a_path_is_not(folder, monkeypatch):
    (folder / "photos").rename(folder / "ffhq64")
    assert "ffhq64: is the row edm/ffhq64 and lies here too; write ./ffhq64" in run("fid", "ffhq64", status=2)
    run("reference", "ffhq64", "-o", "ref.npz", "--device", "cpu")
    assert "FID=" in run("fid", "./ffhq64", "--ref", "ref.npz", "--device", "cpu")
    assert "no such row" in run("fid", "nothing_of_that_name", status=2)


def test_too_few_images_for_the_features_are_refused(folder, monkeypatch):
    for number in range(27, 40):
        (folder / "photos" / f"{number}.png").unlink()
    message = run("reference", "photos", "-o", "ref.npz", "--device", "cpu", status=2)
    assert "27 images are too few for a covariance of 27 features" in message and not (folder / "ref.npz").exists()
    assert "-o ref.txt: name a file that ends in .npz" in run("reference", "photos", "-o", "ref.txt", status=2)


def test_the_help_names_the_detectors():
    assert all(name in detectors.open_detector.__doc__ for name in ("inception", "dinov2", "timm:NAME"))
    assert "timm:NAME" in run("reference", "--help") and "IMAGES" in run("fid", "--help")
