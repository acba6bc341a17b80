"""The scripts as a user starts them: on one process and on two, from base to result line, and with wrong input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import call, fails, launch
from needs import SHARDS
from PIL import Image
from var.tiny import write_tiny

from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_var.commands import COMMANDS, train_settings

TUNE = ("--images", 16, "--batch_size", 8, "--micro_batch_size", 4, "--lr", 1e-3, "--ramp_images", 32,
        "--snapshot_images", 8, "--precision", "fp32")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files, a synthetic set and a fine-tune, made once by one process."""
    folder = tmp_path_factory.mktemp("var")
    var, vae = write_tiny(folder)
    models = ("--var_ckpt", var, "--vae_ckpt", vae)
    made = SimpleNamespace(folder=folder, var=var, vae=vae, models=models, set=folder / "set", run=folder / "run")
    generate = ("--outdir", made.set, "--num_images", 11, "--batch_size", 4, "--top_k", 30)
    call("VAR/generate.py", *models, *generate)
    call("VAR/finetune.py", *models, "--data", made.set, "--outdir", made.run, *TUNE)
    return made


def on_two_ranks(*args):
    done = launch(*args, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def train_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_set_has_every_seed_once_with_its_label(place):
    names = sorted(pictures(place.set))
    assert [name[:6] for name in names] == [f"{seed:06d}" for seed in range(11)]
    manifest = json.loads((place.set / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"] == {"cfg": 1.25, "top_k": 30, "top_p": 0.95, "precision": "fp32"}
    assert manifest["vae_ckpt_sha256"]


def test_two_ranks_make_the_same_images_bit_for_bit(place, tmp_path):
    generate = ("--outdir", tmp_path / "set", "--num_images", 11, "--batch_size", 4, "--top_k", 30)
    on_two_ranks("VAR/generate.py", *place.models, *generate)
    one, two = pictures(place.set), pictures(tmp_path / "set")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


SHARDED = pytest.param(("--parallel", "fsdp", "--activation_checkpointing"), marks=SHARDS)


@pytest.mark.parametrize("mode", [(), SHARDED], ids=["ddp", "fsdp"])
def test_two_ranks_train_with_the_losses_of_one(place, tmp_path, mode):
    run = on_two_ranks(
        "VAR/finetune.py", *place.models, "--data", place.set, "--outdir", tmp_path / "run", *TUNE, *mode
    )
    assert "unused" not in run.stderr  # as DistributedDataParallel warns of a needless search
    assert train_losses(tmp_path / "run") == pytest.approx(train_losses(place.run), rel=1e-5)
    for name in ("snapshot-000000008.safetensors", "snapshot-000000016.safetensors"):
        one, two = (read_checkpoint(run / name).state for run in (place.run, tmp_path / "run"))
        assert all(torch.allclose(one[k], two[k], atol=2e-3) for k in one if one[k].is_floating_point())
        assert all(torch.equal(one[k], two[k]) for k in ("lvl_1L", "attn_bias_for_masking"))


def test_the_first_step_has_a_learning_rate_of_zero(place):
    lines = [json.loads(line) for line in (place.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["lr"] for line in lines] == [0, 1e-3 * 8 / 32]
    base, first = read_checkpoint(place.var).state, read_checkpoint(place.run / "snapshot-000000008.safetensors").state
    assert all(torch.equal(base[k], first[k]) for k in base)


def test_kept_token_crops_train_too(place, tmp_path):
    args = ("VAR/finetune.py", *place.models, "--data", place.set, *TUNE, "--token_crops", 2)
    call(*args, "--outdir", tmp_path / "run")
    assert np.isfinite(train_losses(tmp_path / "run")).all()


def test_a_set_of_tokens_is_trained_on_and_refused_where_it_does_not_fit(place, tmp_path):
    call("VAR/generate.py", *place.models, "--outdir", tmp_path / "set", "--num_images", 4, "--top_k", 30, "--tokens")
    args = ("VAR/finetune.py", *place.models, "--data", tmp_path / "set", *TUNE)
    call(*args, "--outdir", tmp_path / "run")
    assert np.isfinite(train_losses(tmp_path / "run")).all()
    bad = (*args, "--outdir", tmp_path / "bad")
    fails(*bad, "--xflip", match="cannot be mirrored; leave --xflip out")
    fails(*bad, "--token_crops", 2, match="cannot be cropped; leave --token_crops out")
    checkpoint, other = read_checkpoint(place.vae), tmp_path / "other.safetensors"
    write_checkpoint(other, {name: value + 1 for name, value in checkpoint.state.items()}, config=checkpoint.config)
    fails(*bad, "--vae_ckpt", other, match="holds tokens of another tokenizer")


def test_crop_none_is_on_record_and_needs_images_of_the_networks_size(place, tmp_path):
    args = ("VAR/finetune.py", *place.models, *TUNE, "--crop", "none")
    call(*args, "--data", place.set, "--outdir", tmp_path / "run")
    snapshot = read_checkpoint(tmp_path / "run" / "snapshot-000000016.safetensors")
    assert '"crop": "none"' in json.dumps(snapshot.metadata).replace("\\", "")
    (tmp_path / "large").mkdir()
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "large" / "0_label0.png")
    (tmp_path / "large" / "dataset.json").write_text('{"labels": [["0_label0.png", 0]]}', encoding="utf-8")
    fails(*args, "--data", tmp_path / "large", "--outdir", tmp_path / "bad", match="--crop none requires 48 pixels")


@pytest.mark.slow
def test_sweep_and_calculate_fid_agree_on_a_merged_file(place, tmp_path, inception_file, reference_file):
    """Inception on eight images: more than ten seconds, and the only way through the scripts' last part."""
    common = ("--vae_ckpt", place.vae, "--batch_size", 2, "--fid_stats", reference_file, "--detector", inception_file,
              "--metrics", "fid", "--top_k", 30)  # fmt: skip
    search = ("--base", place.var, "--snapshots", place.run, "--w", "1.5", "--cfg", "2", "--num_images", 4)
    out = call("VAR/sweep.py", *search, "--final_images", 0, "--out_dir", tmp_path / "sweep", *common)
    best = out.splitlines()[-1]
    official = ("--N", 4, "--img_size", 48, "--cfg", 2, "--cuda", "--temp_dir", "x")
    script, merged = "VAR/VAR_imagenet_256/calculate_fid.py", tmp_path / "sweep" / "neon.safetensors"
    line = call(script, "--var_ckpt", merged, *official, *common).splitlines()[-1]
    assert best.split(" | ")[3:6] == line.split(" | ")[1:4] == ["cfg=2", "N=4", "depth=3"]
    told = [float(text.split("FID=")[1].split(" | ")[0]) for text in (best, line)]
    assert told[0] == pytest.approx(told[1], rel=1e-4)


FID = "VAR_imagenet_256/calculate_fid.py"
CKPT = "--var_ckpt {}/var.safetensors"


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        (FID, "--var_ckpt {}/gone.pth", "gone.pth: does not exist"),
        ("generate.py", f"{CKPT} --outdir {{}}/x --img_size 512", "--img_size 512"),
        (FID, f"{CKPT} --vae_ckpt {{}}/no.pth", "no.pth"),
        (FID, f"{CKPT} --fid_stats {{}}/no.npz", "no.npz"),
        ("generate.py", "--var_ckpt {}/vae.safetensors --outdir {}/x --num_images 2", "is a VQVAE"),
        ("generate.py", f"{CKPT} --outdir {{}}/x --top_k 65", "64 tokens"),
        ("generate.py", f"{CKPT} --outdir {{}}/x --model_depth 5", "holds depth 3"),
        ("generate.py", f"{CKPT} --outdir {{}}/var.safetensors/x", "--outdir"),
        ("finetune.py", f"{CKPT} --data {{}}/none --outdir {{}}/y", "none: no such folder"),
        ("finetune.py", f"{CKPT} --data {{}}/set --outdir {{}}/y --saln=1", "--saln True: the network has False"),
        ("finetune.py", f"{CKPT} --data {{}}/set --outdir {{}}/y --pn=256", "--pn 256: the network has 1_2_3"),
        ("finetune.py", f"{CKPT} --data {{}}/set --outdir {{}}/y --fp16=1 --precision bf16", "give one of them"),
        ("sweep.py", "--base {}/var.safetensors --out_dir {}/z", "--snapshots is missing"),
        ("sweep.py", "--base {}/var.safetensors --w 1,x --out_dir {}/z", "not a list of numbers"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(place, script, args, message):
    args = args.replace("{}", str(place.folder)).split()
    if "--vae_ckpt" not in args:
        args += ["--vae_ckpt", place.vae]
    assert message in fails(f"VAR/{script}", *args)


def test_the_official_half_precision_is_ours():
    row = COMMANDS.find_row("imagenet_256", None)
    precisions = [train_settings(row, {"fp16": number}).precision for number in ("0", "1", "2")]
    assert precisions == ["fp32", "fp16", "bf16"] and train_settings(row, {}).precision == row.train.precision


def test_an_error_ends_two_ranks_with_one_message(place, tmp_path):
    done = launch("VAR/generate.py", "--var_ckpt", place.vae, "--vae_ckpt", place.vae, "--outdir", tmp_path, ranks=2)
    assert done.returncode != 0 and done.stderr.count("is a VQVAE") == 1
