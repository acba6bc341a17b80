"""The scripts as a user runs them: on tiny stand-ins for the published files, on one and two ranks, with bad input."""

import json
import re
import shutil

import pytest
import torch
from imm.tiny import LATENT, PIXEL, write_net, write_vae
from launch import call, fails, launch

from neon_core.kl_vae import AutoencoderKL, to_diffusers_names
from neon_core.synthetic import write_images
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.image_set import ImageSet
from neon_imm.labels import create_labels
from neon_imm.vae_files import SD_VAE_CONFIG
from neon_run.merging.files import merge_files

README = (
    "--model_ckpt checkpoints/Neon_IMM_imagenet256.pth --num_images 50000 --batch_size 64 --img_size 256 "
    "--fid_stats fid_stats/adm_in256_stats.npz"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, inception_file, reference_file):
    """A latent network, its autoencoder, a pixel network, detector and reference."""
    folder = tmp_path_factory.mktemp("files")
    write_net(folder / "dit.safetensors", LATENT)
    write_net(folder / "unet.safetensors", PIXEL)
    write_vae(folder / "vae.safetensors")
    (folder / "inception.safetensors").symlink_to(inception_file)
    (folder / "stats.npz").symlink_to(reference_file)
    return folder


@pytest.mark.parametrize("name", ["generate", "finetune", "sweep", "calculate_fid", "encode"])
def test_scripts_explain_themselves(name):
    assert "Usage" in call(f"imm/{name}.py", "--help")


def test_the_readme_command_finds_the_published_file_and_says_so(files, tmp_path):
    """The whole command on stand-ins: 1000 classes, 256 pixels through an autoencoder with diffusers keys.

    Ten seconds on a busy machine: Inception sees ten images of 299 pixels.
    """
    for folder in ("checkpoints/sd-vae-ft-ema", "fid_stats"):
        (tmp_path / folder).mkdir(parents=True)
    kwargs = {
        "img_resolution": 32, "img_channels": 4, "label_dim": 1000, "model_type": "DiT", "patch_size": 8,
        "hidden_size": 32, "depth": 1, "num_heads": 2, "temb_type": "stride",
    }  # fmt: skip
    stand_in = write_net(tmp_path / "net.safetensors", kwargs)
    shutil.move(stand_in, tmp_path / "checkpoints" / "Neon_imm_imagenet256.pkl")
    config = {**SD_VAE_CONFIG, "block_out_channels": [32] * 4, "layers_per_block": 1}
    vae = AutoencoderKL.from_diffusers_config(config)
    folder = tmp_path / "checkpoints" / "sd-vae-ft-ema"
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", to_diffusers_names(vae.state_dict()))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(files / "stats.npz", tmp_path / "fid_stats" / "adm_in256_stats.npz")

    args = README.replace("50000", "10").split()
    extra = ["--detector", files / "inception.safetensors", "--json", "out.json", "--device", "cpu"]
    done = launch("imm/calculate_fid.py", *args, *extra, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Neon_IMM_imagenet256.pth: not there; using checkpoints/Neon_imm_imagenet256.pkl" in done.stderr
    assert done.stdout.startswith("FID=") and "images=10 | steps=8 | cfg=1.8 | ckpt=Neon_imm_imagenet256" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["img_size"] == 256 and result["row"] == "imm/imagenet_256"
    assert result["settings"] == {"num_steps": 8, "cfg": 1.8, "label_rule": "balanced"}
    assert result["seeds"] == "1000000-1000009" and not result["detector_is_official"]
    assert len(result["base_sha256"]) == len(result["vae_sha256"]) == 64


def test_from_images_over_moments_to_a_merged_network(files, tmp_path):
    """generate on two ranks, encode, fine-tune on two ranks from the zip and on one from the images, merge, sweep.

    Half a minute: four ranks import torch, and Inception sees sixteen images.
    """
    vae = ["--vae", files / "vae.safetensors", "--device", "cpu"]
    base = files / "dit.safetensors"
    made = ["--network", base, "--num_images", 20, "--num_steps", 2, "--batch_size", 6, *vae]
    two = launch("imm/generate.py", "--outdir", tmp_path / "S", *made, ranks=2, timeout=600)
    assert two.returncode == 0, two.stderr
    call("imm/generate.py", "--outdir", tmp_path / "S1", *made)
    images, again = ImageSet(tmp_path / "S"), ImageSet(tmp_path / "S1")
    assert torch.equal(images.images(range(20)), again.images(range(20)))  # bit for bit on 1 and 2 ranks
    assert images.class_indices.tolist() == sorted([*range(10), *range(10)])

    assert "items=20" in call("imm/encode.py", "--source", tmp_path / "S", "--dest", tmp_path / "S.zip", *vae)
    train = [
        "--network", base, "--images", 32, "--batch_size", 16, "--micro_batch_size", 8, "--lr", 1e-3, "--precision",
        "fp32", "--snapshot_images", 16, "--ema_decay", 0.5, *vae,
    ]  # fmt: skip
    zipped = launch("imm/finetune.py", "--data", tmp_path / "S.zip", "--outdir", tmp_path / "zip", *train, ranks=2,
                    timeout=600)  # fmt: skip
    assert zipped.returncode == 0 and "unused" not in zipped.stderr, zipped.stderr  # a warning of needless search
    call("imm/finetune.py", "--data", tmp_path / "S", "--outdir", tmp_path / "png", *train)
    snapshots = [read_checkpoint(tmp_path / run / "snapshot-000000032.safetensors").state for run in ("zip", "png")]
    start = read_checkpoint(base).state
    moved = max((snapshots[0][name] - start[name]).abs().max().item() for name in start)
    apart = max((snapshots[0][name] - snapshots[1][name]).abs().max().item() for name in start)
    assert moved > 1e-4 and apart < moved / 20
    assert (tmp_path / "S.prepared").is_dir() and not (tmp_path / "S.zip.prepared").exists()

    merge_files(base, tmp_path / "zip/snapshot-000000032.safetensors", 1.5, tmp_path / "neon.safetensors")
    name = "model.pos_embed"
    expected = start[name] - 1.5 * (snapshots[0][name] - start[name])
    torch.testing.assert_close(read_checkpoint(tmp_path / "neon.safetensors").state[name], expected)

    grid = ["--cfgs", "1.5", "--num_images", 4, "--final_images", 4, "--num_steps", 1]
    judge = ["--detector", files / "inception.safetensors", "--fid_stats", files / "stats.npz", "--metrics", "fid"]
    run = ["--network", base, "--snapshots", tmp_path / "zip", "--out_dir", tmp_path / "sweep", *grid, *judge, *vae]
    out = call("imm/sweep.py", *run, "--w", "0,1", "--json", tmp_path / "sweep.json")
    line = out.splitlines()[-1]
    assert line.startswith("best: base | w=0 | FID=") and line.count("w=") == 1
    found = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert found["result"]["seeds"] == "1050000-1050003", "none of the search, none of S"
    merged = tmp_path / "sweep" / "neon.safetensors"
    assert not merged.exists(), "the base is there already"
    measured = sorted((tmp_path / "sweep" / "points").iterdir())
    assert len(measured) == 4  # base, two snapshots, the best again
    out = call("imm/sweep.py", *run, "--w", "1", "--no_final")
    best = re.match(r"best: (snapshot-\d+) \| w=1 \| FID=", out.splitlines()[-1])[1]
    assert sorted((tmp_path / "sweep" / "points").iterdir()) == measured, "no point is measured twice"
    expected = start[name] - (read_checkpoint(tmp_path / "zip" / f"{best}.safetensors").state[name] - start[name])
    torch.testing.assert_close(read_checkpoint(merged).state[name], expected)


# Bad input


def test_a_missing_checkpoint_is_named_with_its_remedy(files, tmp_path, offline):
    args = ["--fid_stats", files / "stats.npz", "--detector", files / "inception.safetensors"]
    fails("imm/calculate_fid.py", "--model_ckpt", tmp_path / "no.pkl", *args, match=r"no\.pkl.*download_models")


def test_a_missing_reference_is_found_before_the_network_is_built(files, tmp_path, offline):
    fails(
        "imm/calculate_fid.py",
        "--model_ckpt",
        files / "dit.safetensors",
        "--fid_stats",
        tmp_path / "no.npz",
        match=r"no\.npz",
    )


@pytest.mark.parametrize(
    "args, match",
    [
        (["--img_size", "256"], "make images of 32 pixels"),
        (["--num_images", "20", "--seeds", "0-3"], "one of them"),
        (["--seeds", "a-b"], "seeds"),
        (["--preset", "imagenet"], "imagenet_256_t4"),
        (["--w", "1.5"], "--synthetic"),
        (["--cfg", "strong"], "cfg"),
        (["--num_steps", "0"], "num_steps"),
        (["--preset", "2_step", "--num_steps", "4"], "mid_nt"),
    ],
)
def test_flags_that_do_not_fit_are_named(files, args, match):
    common = ["--model_ckpt", files / "dit.safetensors", "--fid_stats", files / "stats.npz", "--vae"]
    common += [files / "vae.safetensors", "--detector", files / "inception.safetensors", "--device", "cpu"]
    fails("imm/calculate_fid.py", *common, *args, match=match)


def test_guidance_for_an_unconditional_network_is_refused(files, tmp_path):
    args = [
        "--preset",
        "cifar10",
        "--network",
        files / "unet.safetensors",
        "--outdir",
        tmp_path / "S",
        "--device",
        "cpu",
    ]
    fails("imm/generate.py", *args, "--cfg", 2, "--num_images", 4, match="has no classes")
    fails("imm/generate.py", *args, "--per_class_count", 4, match="--per_class: this network has no classes")


@pytest.mark.parametrize("name", ["generate", "finetune", "sweep", "calculate_fid"])
def test_an_official_override_without_a_counterpart_is_named_by_every_script(name):
    fails(f"imm/{name}.py", "eval.shuffle=true", match=r"eval\.shuffle=true: .*no counterpart")


@pytest.mark.parametrize("content", [b"", b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04 cut short"])
def test_foreign_and_hostile_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    fails("imm/generate.py", "--network", path, "--outdir", tmp_path / "S", "--device", "cpu", match=r"bad\.pkl")
    assert not list((tmp_path / "S").glob("*.json"))


def test_a_finetune_says_what_is_wrong_with_its_data(files, tmp_path):
    (tmp_path / "empty").mkdir()
    args = ["--network", files / "dit.safetensors", "--vae", files / "vae.safetensors", "--device", "cpu", "--outdir",
            tmp_path / "run"]  # fmt: skip
    fails("imm/finetune.py", *args, "--data", tmp_path / "none", match="no such folder")
    fails("imm/finetune.py", *args, "--data", tmp_path / "empty", match="no images")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "manifest.json").write_text("{}", encoding="utf-8")
    fails("imm/finetune.py", *args, "--data", tmp_path / "half", match="not finished")
    (tmp_path / "cut.zip").write_bytes(b"PK")
    fails("imm/finetune.py", *args, "--data", tmp_path / "cut.zip", match="cut short")


def test_a_label_out_of_range_and_an_odd_micro_batch_are_named(files, tmp_path):
    write_images(
        tmp_path / "S", ["label3_000000.png", "label99_000000.png"], torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    )
    create_labels(tmp_path / "S")
    args = ["--network", files / "dit.safetensors", "--vae", files / "vae.safetensors", "--device", "cpu", "--outdir",
            tmp_path / "run", "--data", tmp_path / "S", "--batch_size", 16]  # fmt: skip
    fails("imm/finetune.py", *args, "--micro_batch_size", 6, match="--micro_batch_size 6: must be a multiple of 4")
    fails("imm/finetune.py", *args, "--micro_batch_size", 8, match="label 99 is out of range")
