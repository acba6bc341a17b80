"""The four scripts as a user runs them: on a pickle of pico size, alone and on two ranks, and with bad input."""

import json

import numpy as np
import pytest
import torch
from edm.conftest import write_pico
from launch import call, fails, launch

from neon_edm.commands import COMMANDS
from neon_files.image_set import ImageSet
from neon_run.commands import command
from neon_run.merging.command import merge_command


def parsed(stage: str, args: str) -> dict:
    """What a script reads of its command line."""
    return command(stage, COMMANDS).make_context(stage, args.split()).params


def test_scripts_run_from_anywhere_without_installation(tmp_path):
    done = launch("edm/calculate_fid.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--num_steps" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        "--network_pkl checkpoints/Neon_EDM_conditional_CIFAR10.pkl --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"
        "cifar10-32x32.npz --seeds 0-49999 --max_batch_size 256 --num_steps 18",
        "--network_pkl a.pkl --ref b.npz --class 3 --sigma_min 0.01 --sigma_max 50 --rho 5 --s_churn 1 --s_min 0.1 "
        "--s_max 9 --s_noise 1.003",
        "--network a.pkl --ref b.npz --batch 3 --steps 40 --S_churn 1 --S_min 0.1 --S_max 9 --S_noise 1.003",
    ],
)
def test_calculate_fid_takes_the_official_flags_in_both_spellings(args):
    params = parsed("calculate_fid", args)
    assert params["checkpoint"].endswith(".pkl") and params["reference"].endswith(".npz")


def test_generate_takes_the_official_flags():
    args = "--outdir S --network a.pkl --seeds 0-5,9 --subdirs --class 1 --batch 2 --steps 9 --S_churn 2 --rho 7"
    params = parsed("generate", args)
    assert params["seeds"] == [0, 1, 2, 3, 4, 5, 9] and params["num_steps"] == 9 and params["subfolders"]


@pytest.mark.parametrize(
    "args",
    [
        "--outdir=training-runs/cifar10/ns6k --data=datasets/cifar10/ns6k --cond=1 --arch=ddpmpp --lr=1e-4 --tick=50"
        " --snap=10 --duration=6 --nosubdir --transfer=base.pkl",
        "--outdir=training-runs/ffhq/ns18k --data=datasets/ffhq/ns18k --cond=0 --arch=ddpmpp --batch=256 --cres=1,2,2,2"
        " --lr=4e-6 --dropout=0.05 --augment=0.15 --tick=50 --snap=5 --duration=3 --nosubdir --transfer=base.pkl",
    ],
)
def test_finetune_takes_the_official_training_commands(args):
    params = parsed("finetune", args)
    assert params["checkpoint"] == "base.pkl" and params["cond"] is ("cifar10" in args)


def test_a_fine_tune_asks_which_row_it_is_of(tmp_path):
    """No row's settings fit any network, and each leaves other snapshots."""
    args = ["--data", tmp_path / "S", "--outdir", tmp_path / "run", "--transfer", "base.pkl"]
    fails("edm/finetune.py", *args, match="--preset is missing; choose one of cifar10_cond, .*ffhq64")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seeds", "9-7"], "names no seed"),
        (["--seeds", "0-x"], "neither a number nor a range"),
        (["--num_steps", "1"], "1 is not in the range"),
        (["--sigma_min", "90"], "must be below --sigma_max"),
        (["--class", "-1"], "-1 is not in the range"),
    ],
)
def test_flags_that_make_no_sense_are_refused_at_once(args, said, tmp_path, reference_file, inception_file):
    """Before the network, which cannot be read, is opened."""
    (tmp_path / "a.pkl").touch()
    files = ("--network", tmp_path / "a.pkl", "--ref", reference_file, "--detector", inception_file)
    fails("edm/calculate_fid.py", *files, *args, match=said)


def test_missing_files_are_named_before_anything_is_made(tmp_path, reference_file, inception_file):
    base = write_pico(tmp_path / "base.safetensors")
    measured = ["--ref", reference_file, "--detector", inception_file]
    line = fails("edm/calculate_fid.py", "--network", tmp_path / "none.pkl", "--seeds", "0-7", *measured)
    assert "none.pkl" in line and "download_models.sh" in line
    line = fails("edm/finetune.py", "--preset", "ffhq64", "--transfer", base, "--data", tmp_path / "nowhere",
                 "--outdir", tmp_path / "run")  # fmt: skip
    assert "nowhere" in line and not (tmp_path / "run").exists()
    line = fails("edm/sweep.py", "--base", base, "--snapshots", tmp_path, "--out_dir", tmp_path / "out", *measured)
    assert "no snapshots" in line
    line = fails("edm/generate.py", "--network", base, "--class", 4, "--outdir", tmp_path / "S")
    assert "classes 0 to 3" in line and not list((tmp_path / "S").iterdir())
    line = fails("edm/generate.py", "--network", base, "--outdir", base)
    assert "--outdir" in line


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = launch("edm/calculate_fid.py", "--network", tmp_path / "a.pkl", "--ref", tmp_path / "none.npz")
    assert done.returncode == 2 and done.stdout == ""
    assert "none.npz" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_from_a_published_pickle_to_neon_and_its_fid(tmp_path, golden_data, reference_file, inception_file, capsys):
    """All stages through the scripts. More than ten seconds for 24 images through the Inception network."""
    base = golden_data / "edm" / "pickle_snapshot.pkl"
    data, run_dir, sweep_dir = tmp_path / "S", tmp_path / "run", tmp_path / "sweep"
    out = call("edm/generate.py", "--network", base, "--seeds", "0-11", "--steps", 3, "--outdir", data, "--batch", 5)
    assert out.startswith("12 images | ")
    images = ImageSet(data)
    assert len(images) == 12 and images.shape == (3, 8, 8)
    assert all(f"_label{k}.png" in name for name, k in zip(images.names, images.class_indices.tolist(), strict=True))

    out = call(
        "edm/finetune.py", "--preset", "cifar10_cond", "--transfer", base, "--data", data, "--outdir", run_dir,
        "--duration", 0.002, "--batch", 100, "--batch-gpu", 50, "--tick", 1, "--snap", 1, "--lr", 10,
    )  # fmt: skip
    assert out.startswith("2 snapshots | ")
    losses = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses[0]["lr"] == 0 and losses[-1]["images"] == 2000 and np.isfinite([x["loss"] for x in losses]).all()

    evaluation = ["--ref", reference_file, "--detector", inception_file, "--num_steps", 3, "--max_batch_size", 4]
    lines = call(
        "edm/sweep.py", "--base", base, "--snapshots", run_dir, "--w", "0.5,1", "--min_training_step", 2,
        "--seeds_test", "0-3", "--no_final", "--metrics", "fid", "--out_dir", sweep_dir, *evaluation,
    ).splitlines()  # fmt: skip
    assert lines[-1].startswith("best: snapshot-000002000 | w=")

    neon = tmp_path / "neon.safetensors"
    merge_command.main([str(base), str(run_dir / "snapshot-000002000.safetensors"), "-w", "1", "-o", str(neon)],
                       standalone_mode=False)  # fmt: skip
    fid = {}
    for name, network in (("base", base), ("neon", neon)):
        json_file = tmp_path / f"{name}.json"
        out = call("edm/calculate_fid.py", "--network_pkl", network, "--seeds", "0-3", "--json", json_file, *evaluation)
        fid[name] = json.loads(json_file.read_text(encoding="utf-8"))["fid"]
        assert out.startswith(f"FID={fid[name]:.6f} | conditional | steps=3 | detector=")
    (point,) = (sweep_dir / "points").glob("snapshot-000002000-w1-*.json")
    assert json.loads(point.read_text(encoding="utf-8"))["fid"] == pytest.approx(fid["neon"], rel=1e-6), (
        "the sweep moves in place, the merge writes"
    )
    assert fid["base"] != pytest.approx(fid["neon"], rel=1e-6)
    assert "note: the settings" not in capsys.readouterr().err, "no row was named"


@pytest.mark.slow
def test_two_ranks_make_the_same_set_fine_tune_and_fid(tmp_path, reference_file, inception_file):
    """More than ten seconds for three launches of two processes each."""
    base = write_pico(tmp_path / "base.safetensors", dropout=0.0)
    fids, losses, sets = [], [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        stages = (
            ("generate", "--network", base, "--seeds", "0-4", "--steps", 3, "--outdir", folder / "S", "--batch", 2),
            ("finetune", "--preset", "cifar10_cond", "--transfer", base, "--data", folder / "S",
             "--outdir", folder / "run", "--duration", 0.001,
             "--batch", 100, "--micro_batch", 25, "--tick", 1, "--dropout", 0),
            ("calculate_fid", "--network", base, "--ref", reference_file, "--detector", inception_file,
             "--seeds", "0-4", "--steps", 3, "--batch", 2, "--json", folder / "fid.json"),
        )  # fmt: skip
        for name, *args in stages:
            if ranks == 1:
                out = call(f"edm/{name}.py", *args)
            else:
                done = launch(f"edm/{name}.py", *args, ranks=ranks)
                assert done.returncode == 0, done.stderr
                assert "unused" not in done.stderr  # as DistributedDataParallel warns of a needless search
                out = done.stdout
            assert len(out.splitlines()) == 1
        fids.append(json.loads((folder / "fid.json").read_text(encoding="utf-8"))["fid"])
        losses.append(
            [
                json.loads(line)["loss"]
                for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            ]
        )
        sets.append(ImageSet(folder / "S"))
    assert sets[0].names == sets[1].names
    assert torch.equal(sets[0].images(range(5)), sets[1].images(range(5)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert fids[1] == pytest.approx(fids[0], rel=1e-9)
