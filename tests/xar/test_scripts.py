"""The scripts as a user starts them: README's flags, several ranks, wrong input."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, call, fails, launch
from PIL import Image
from xar.pico import write_pico

from neon_files.checkpoint import read_checkpoint
from neon_metrics.detector import FunctionDetector
from neon_metrics.evaluate import Evaluator
from neon_metrics.reference import Reference, write_reference
from neon_xar.backbone import XARBackbone

README_COMMANDS = [
    line.split("xAR/calculate_fid.py ", 1)[1]
    for line in (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    if line.startswith("PYTHONPATH=xAR torchrun") and "xAR/calculate_fid.py" in line
]
SHORT = ("--images", 16, "--batch_size", 8, "--micro_batch_size", 4, "--lr", 1e-3, "--ramp_images", 16, "--ema_decay",
         0.5, "--snapshot_images", 8, "--precision", "fp32")  # fmt: skip


def succeed(*args, **options):
    done = launch(*args, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pico checkpoint, its autoencoder, and a set of 11 images made by two ranks."""
    folder = tmp_path_factory.mktemp("xar")
    base, vae = write_pico(folder)
    flags = ("--model_ckpt", base, "--vae_path", vae)
    made = ("--num_images", 11, "--batch_size", 4, "--flow_steps", 3)
    succeed("xAR/generate.py", *flags, *made, "--outdir", folder / "S", ranks=2)
    return folder, flags, made


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def test_any_number_of_images_comes_out_once_each_and_the_same_from_one_process_as_from_two(place, tmp_path):
    folder, flags, made = place
    call("xAR/generate.py", *flags, *made, "--outdir", tmp_path / "one", "--device", "cpu")
    two, one = pixels(folder / "S"), pixels(tmp_path / "one")
    assert sorted(two) == [f"{seed:06d}_label{seed % 10}.png" for seed in range(11)]
    assert two.keys() == one.keys() and all(np.array_equal(two[name], one[name]) for name in two)
    manifest = json.loads((folder / "S" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"] == {"cfg": 2.7, "flow_steps": 3} and manifest["row"] == "xar/xar_base"


def test_a_fine_tune_on_two_ranks_has_the_losses_of_one_process_and_leaves_buffers_alone(place, tmp_path):
    folder, flags, _ = place
    run = succeed("xAR/finetune.py", *flags, "--data", folder / "S", "--outdir", tmp_path / "two", *SHORT, ranks=2)
    assert "unused" not in run.stderr  # as DistributedDataParallel warns of a needless search
    assert len(list(folder.glob("S.prepared/moments-*/part-*.npy"))) == 1  # encoded once, beside the set
    call("xAR/finetune.py", *flags, "--data", folder / "S", "--outdir", tmp_path / "one", *SHORT, "--device", "cpu")
    logs = [
        [json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for n in ("one", "two")
    ]
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [line["lr"] for line in logs[0]] == [0, 5e-4]
    base = read_checkpoint(flags[1]).state
    states = [read_checkpoint(tmp_path / n / "snapshot-000000016.safetensors") for n in ("one", "two")]
    assert all(torch.allclose(a, states[1].state[k], atol=2e-4) for k, a in states[0].state.items() if k != "mask")
    assert torch.equal(states[0].state["mask"], base["mask"]) and states[0].config["class"] == "XAR"
    assert not torch.equal(states[0].state["pred.weight"], base["pred.weight"])


@pytest.mark.parametrize("command", README_COMMANDS)
def test_the_readme_commands_run_with_stand_ins_for_their_files(place, tmp_path, command, monkeypatch, capsys):
    """The files are picos, so --img_size is theirs; the feature network is a stand-in too."""
    folder, _, _ = place
    assert len(README_COMMANDS) == 2
    given = shlex.split(command)
    ours = {
        "--model_ckpt": folder / "base.pth",
        "--vae_path": folder / "vae.ckpt",
        "--num_images": 13,
        "--img_size": 32,
    }
    ours |= {"--flow_steps": 3, "--batch_size": 5}
    flags = [ours.get(previous, flag) for previous, flag in zip(["", *given], given, strict=False)]
    detector = FunctionDetector("means", 3, lambda images: images.float().mean((2, 3)) / 255)
    write_reference(tmp_path / "unit.npz", Reference(np.zeros(3), np.eye(3)))
    seen = []

    def stand_in(reference, **options):
        seen.append(options["metrics"])
        return Evaluator(reference, device=options["device"], metrics=("fid",), detector=detector)

    monkeypatch.setattr("neon_run.commands.Evaluator", stand_in)
    monkeypatch.setattr("neon_run.commands.default_weight_paths", lambda: [tmp_path / "unit.npz"])
    flags += ["--json", tmp_path / "r.json", "--device", "cpu", "--fid_stats", tmp_path / "unit.npz"]
    capsys.readouterr()
    out = call("xAR/calculate_fid.py", *flags)
    err = capsys.readouterr().err
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert seen == [("fid", "is")] and given[-1] == "fid_stats/adm_in256_stats.npz"
    assert out.startswith("FID=") and f"cfg={given[5]} | steps=3 | n=13 | model={given[1]} | ckpt=base" in out
    assert "note: the settings of xar/" in err
    assert result["seeds"] == "1000000-1000012"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flow_steps", "2"], "--flow_steps 2: .* at least 3"),
        (["--model", "xar_tiny"], "--preset xar_tiny: no such row; choose xar/.* or xar/xar_"),
        (["--model_ckpt", "nowhere.pth"], r"--model_ckpt nowhere.pth: does not exist"),
        (["--vae_path", "nowhere.ckpt"], r"--vae_path nowhere.ckpt: does not exist"),
        (["--fid_stats", "nowhere.npz"], "nowhere.npz"),
        (["--seeds", "1,x"], "neither a number nor a range"),
        (["--cfg", "nan"], "--cfg nan: a finite number"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_model_is_built(place, tmp_path, flags, message, monkeypatch):
    _, files, _ = place

    def never(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(XARBackbone, "load", never)
    monkeypatch.setattr("neon_run.commands.default_weight_paths", lambda: [tmp_path])
    write_reference(tmp_path / "unit.npz", Reference(np.zeros(2048), np.eye(2048)))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    every = {"--model": "xar_base", "--model_ckpt": files[1], "--vae_path": files[3], "--device": "cpu"}
    every |= {"--fid_stats": tmp_path / "unit.npz"}
    fails("xAR/calculate_fid.py", *(part for pair in (every | given).items() for part in pair), match=message)


def test_a_size_that_the_model_cannot_make_is_refused(place, tmp_path):
    _, flags, made = place
    args = (*flags, *made, "--outdir", tmp_path / "S", "--img_size", 512, "--device", "cpu")
    fails("xAR/generate.py", *args, match="--img_size 512: .* images of 32 pixels a side")
    assert not list(tmp_path.rglob("*.png"))


def test_what_the_official_fine_tune_says_of_the_network_is_checked(place, tmp_path):
    folder, flags, _ = place
    args = (*flags, "--data", folder / "S", "--outdir", tmp_path, "--device", "cpu", "--img_size", 32)
    fails("xAR/finetune.py", *args, "--vae_embed_dim", 8, match="--vae_embed_dim 8: the network has ")
