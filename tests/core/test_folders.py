"""Folders: every weight file merged as the dense state dict would be, everything else copied, all of it or nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from launch import kill_when, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from neon_core.merge import neon_merge
from neon_files.atomic import sha256_file
from neon_files.errors import UserError
from neon_run.merging.command import merge_command
from neon_run.merging.files import merge_files
from neon_run.merging.folders import PROVENANCE, atomic_folder, merge_folders
from neon_run.merging.steps import Steps

ROOT = Path(__file__).resolve().parents[2]


def random_state(seed: int, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (9, 4), "block.0.weight": (4, 4), "block.1.weight": (4, 4), "head.bias": (3,)}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"steps": torch.tensor(seed)}


def save_sharded(folder: Path, state: dict, count: int, stem: str = "model", suffix: str = ".safetensors") -> None:
    """As the hub's libraries do: shards in numbers, and an index that says where each tensor is."""
    names, weight_map = list(state), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}"
        part = {name: state[name] for name in names[i::count]}
        weight_map |= dict.fromkeys(part, file)
        if suffix == ".safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def load_sharded(folder: Path, stem: str = "model", suffix: str = ".safetensors") -> dict:
    """Through the index, as a loader does."""
    index = json.loads((folder / f"{stem}{suffix}.index.json").read_text(encoding="utf-8"))
    load = load_file if suffix == ".safetensors" else lambda path: torch.load(path, weights_only=True)
    return {name: load(folder / file)[name] for name, file in index["weight_map"].items()}


def pipeline(folder: Path, seed: int, dtype=torch.float32, unet_shards: int = 2) -> Path:
    """A diffusers pipeline: a network in shards, a frozen autoencoder, a tokenizer, settings."""
    for part in ("unet", "vae", "tokenizer"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part}), encoding="utf-8")
    save_sharded(folder / "unet", random_state(seed, dtype), unet_shards, "diffusion_pytorch_model")
    save_file(random_state(0), folder / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}', encoding="utf-8")
    (folder / "tokenizer" / "vocab.bin.txt").write_bytes(b"\0words")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w", [1.5, 0.0, -1.0])
def test_pipeline_equals_the_dense_merge(tmp_path, w, dtype):
    base, syn = pipeline(tmp_path / "base", 1, dtype), pipeline(tmp_path / "syn", 2, dtype, unet_shards=3)
    (syn / "model_index.json").write_text("another one", encoding="utf-8")
    out = merge_folders(base, syn, w, tmp_path / "new" / "out")
    merged = load_sharded(out / "unet", "diffusion_pytorch_model")
    expected = neon_merge(random_state(1, dtype), random_state(2, dtype), w)
    assert_close(merged, expected, rtol=0, atol=1e-6)
    assert {name: value.dtype for name, value in merged.items()} == {k: v.dtype for k, v in expected.items()}

    files = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == files | {PROVENANCE}
    for name in files:  # copied: all but the network
        assert name.startswith("unet/d") or (out / name).read_bytes() == (base / name).read_bytes()
    assert os.listdir(tmp_path / "new") == ["out"]


def test_headers_and_provenance(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    shard = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    with safe_open(out / shard, "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt" and json.loads(header["neon"])["w"] == 1.5  # loaders refuse another "format"
    record = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    assert record["w"] == 1.5 and record["base"][shard] == sha256_file(base / shard)
    assert record["synthetic"][shard] == sha256_file(syn / shard)
    assert not any(name.startswith("vae") for name in record["base"])


@pytest.mark.parametrize("shards", [(1, 3), (3, 1), (2, 3)])
def test_two_ways_of_cutting_and_two_containers(tmp_path, shards):
    base, syn = tmp_path / "base", tmp_path / "syn"
    base.mkdir()
    syn.mkdir()
    save_sharded(base, random_state(1), shards[0])
    save_sharded(syn, random_state(2), shards[1], "pytorch_model", ".bin")
    there = merge_folders(base, syn, 1.5, tmp_path / "there")
    assert_close(load_sharded(there), neon_merge(random_state(1), random_state(2), 1.5), rtol=0, atol=0)
    back = merge_folders(syn, base, 1.5, tmp_path / "back")
    merged = load_sharded(back, "pytorch_model", ".bin")
    assert_close(merged, neon_merge(random_state(2), random_state(1), 1.5), rtol=0, atol=0)


def tied_state(seed: int) -> dict:
    state = random_state(seed)
    return state | {"lm_head.weight": state["embed.weight"]}


@pytest.mark.parametrize("base_stores", ["both", "one", "named"])
@pytest.mark.parametrize("syn_stores", ["both", "one", "named"])
def test_tied_weights_however_each_side_stores_them(tmp_path, base_stores, syn_stores):
    def save(folder: Path, seed: int, stores: str) -> Path:
        folder.mkdir()
        if stores == "both":
            torch.save(tied_state(seed), folder / "pytorch_model.bin")
        else:
            header = {"lm_head.weight": "embed.weight"} if stores == "named" else {}
            save_file(random_state(seed), folder / "model.safetensors", {"format": "pt", **header})
        return folder

    ends = save(tmp_path / "base", 1, base_stores), save(tmp_path / "syn", 2, syn_stores)
    out = merge_folders(*ends, 1.5, tmp_path / "out")
    expected = neon_merge(random_state(1), random_state(2), 1.5)
    if base_stores == "both":
        merged = torch.load(out / "pytorch_model.bin", weights_only=True)
        assert merged["lm_head.weight"].data_ptr() == merged["embed.weight"].data_ptr()
        expected["lm_head.weight"] = expected["embed.weight"]
    else:
        merged = load_file(out / "model.safetensors")
    assert_close(merged, expected, rtol=0, atol=0)


def test_weights_untied_by_the_fine_tune_are_not_tied_again(tmp_path):
    for name in ("base", "syn", "other"):
        (tmp_path / name).mkdir()
    torch.save(tied_state(1), tmp_path / "base" / "pytorch_model.bin")
    syn = tied_state(2) | {"lm_head.weight": random_state(3)["embed.weight"]}
    torch.save(syn, tmp_path / "syn" / "pytorch_model.bin")
    out = merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out")
    merged = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert_close(merged, neon_merge(tied_state(1), syn, 1.5), rtol=0, atol=0)
    save_file(random_state(1), tmp_path / "other" / "model.safetensors", {"lm_head.weight": "embed.weight"})
    with pytest.raises(UserError, match=r"1 keys only in the synthetic checkpoint \(lm_head\.weight\)"):
        merge_folders(tmp_path / "other", tmp_path / "syn", 1.5, tmp_path / "none")


def test_names_and_headers_are_those_of_the_file(tmp_path):
    """A prefix that a single checkpoint would lose is part of the names that an index or another library knows."""
    for folder, seed in (("base", 1), ("syn", 2)):
        (tmp_path / folder).mkdir()
        state = {f"module.{name}": value for name, value in random_state(seed).items()}
        save_sharded(tmp_path / folder, state, 2)
    merged = load_sharded(merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out"))
    expected = neon_merge(random_state(1), random_state(2), 1.5)
    assert_close(merged, {f"module.{name}": value for name, value in expected.items()}, rtol=0, atol=0)


def test_single_safetensors_file_keeps_the_header_that_loaders_look_for(tmp_path):
    for name, seed in (("base", 1), ("syn", 2)):
        save_file(random_state(seed), tmp_path / name, {"format": "pt"})
    with safe_open(merge_files(tmp_path / "base", tmp_path / "syn", 1.0, tmp_path / "out"), "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_links_of_a_hub_cache_are_followed_and_inputs_untouched(tmp_path):
    blobs, base = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    base.mkdir()
    save_file(random_state(1), blobs / "abc")
    (base / "model.safetensors").symlink_to(blobs / "abc")
    (tmp_path / "syn").mkdir()
    save_file(random_state(2), tmp_path / "syn" / "model.safetensors")
    before = sha256_file(blobs / "abc")
    out = merge_folders(base, tmp_path / "syn", 1.5, tmp_path / "out")
    assert not (out / "model.safetensors").is_symlink() and sha256_file(blobs / "abc") == before


def test_state_of_training_is_copied_not_read(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    for name in ("optimizer.bin", "training_args.bin", "random_states_0.pkl", "scheduler.pt"):
        (base / name).write_bytes(b"not to be opened")
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert (out / "optimizer.bin").read_bytes() == b"not to be opened"


def spoil(base: Path, syn: Path, how: str) -> None:
    unet = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    if how == "shard missing":
        (base / unet).unlink()
    elif how == "component missing":
        for path in (syn / "vae").iterdir():
            path.unlink()
    elif how == "other network":
        save_file({"x": torch.ones(2)}, syn / unet)
    elif how == "twice":
        (syn / "unet/diffusion_pytorch_model.safetensors").write_bytes((syn / unet).read_bytes())
    elif how == "format":
        (base / "flax_model.msgpack").write_bytes(b"\0")
    elif how == "cut short":
        (syn / unet).write_bytes((syn / unet).read_bytes()[:-4])
    elif how == "nan":
        save_file(load_file(syn / unet) | {"embed.weight": torch.full((9, 4), torch.nan)}, syn / unet)
    elif how == "broken link":
        (base / "link").symlink_to(base / "nowhere")
    elif how == "circle":
        (base / "again").symlink_to(base, target_is_directory=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shard missing", "keys only in the synthetic checkpoint"),
        ("component missing", r"diffusion_pytorch_model\.safetensors: .* has no weights in its place"),
        ("other network", "not of one network"),
        ("twice", "is also in another file of its folder"),
        ("format", r"flax_model\.msgpack: is not in the other folder, and is neither text nor weights"),
        ("cut short", "not a whole safetensors file"),
        ("nan", r"embed\.weight: not finite in the synthetic checkpoint"),
        ("broken link", "a broken link"),
        ("circle", "leads back to a folder above it"),
    ],
)
def test_broken_inputs_are_named_and_leave_nothing(tmp_path, how, message):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    spoil(base, syn, how)
    with pytest.raises(UserError, match=message):
        merge_folders(base, syn, 1.5, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "syn"]


# Files of other kinds


def two_folders(path: Path, name: str, *, dtype=torch.float32) -> tuple[Path, Path]:
    """A network in model.safetensors, and a second one under `name` as torch.save writes it."""
    for folder, seed in (("base", 1), ("syn", 2)):
        (path / folder).mkdir()
        save_file(random_state(seed), path / folder / "model.safetensors")
        torch.save({"second": torch.full((2,), float(seed))}, path / folder / name)
    return path / "base", path / "syn"


TORCH_NAMES = ["ema.pth.tar", "UNET.PT", "model.t7", "head.pickle", "net.th", "w.params", "x.joblib", "x.ckpt.index"]


@pytest.mark.parametrize("name", [*TORCH_NAMES, "model.pt.bak", "weights"])
def test_torch_files_are_merged_whatever_their_suffix(tmp_path, name):
    base, syn = two_folders(tmp_path, name)
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert torch.load(out / name)["second"].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("name", ["SAFE.SAFETENSORS", "model.safetensors.bak"])
def test_safetensors_are_merged_whatever_their_suffix(tmp_path, name):
    base, syn = two_folders(tmp_path, "other.pt")
    for folder, seed in ((base, 1), (syn, 2)):
        save_file({"second": torch.full((2,), float(seed))}, folder / name)
    assert load_file(merge_folders(base, syn, 1.5, tmp_path / "out") / name)["second"].tolist() == [-0.5, -0.5]


OTHER_NAMES = [
    "x.npz",
    "x.npy",
    "__0_0.distcp",
    "x.onnx",
    "x.gguf",
    "x.msgpack",
    "x.h5",
    "x.pkl",
    "x.zip",
    "x.dat",
    "x",
]


@pytest.mark.parametrize("name", [*OTHER_NAMES, "spiece.model", "x.json", "x.txt"])
@pytest.mark.parametrize("there", [True, False])
def test_files_that_may_be_weights_must_be_equal_in_both(tmp_path, name, there):
    base, syn = two_folders(tmp_path, "second.pt")
    (base / name).write_bytes(b"\x80\0base")
    if there:
        (syn / name).write_bytes(b"\x80\0syn")
    with pytest.raises(UserError, match=f"{name}: {'differs between' if there else 'is not in the other folder'}"):
        merge_folders(base, syn, 1.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_archive_with_damaged_names_is_no_weight_file(tmp_path):
    base, syn = two_folders(tmp_path, "x.dat")
    archive = (base / "x.dat").read_bytes()
    start = archive.index(b"PK\x01\x02") + 46  # the first name in the archive's directory
    (base / "x.dat").write_bytes(
        archive[: start - 38] + b"\0\x08" + archive[start - 36 : start] + b"\xee" + archive[start + 1 :]
    )
    with pytest.raises(UserError, match=r"x\.dat: differs between the two folders"):
        merge_folders(base, syn, 1.5, tmp_path / "out")


@pytest.mark.parametrize("name", ["x.npz", "spiece.model", "x.dat", "deep/x.msgpack"])
def test_unknown_files_that_are_equal_are_copied(tmp_path, name):
    base, syn = two_folders(tmp_path, "second.pt")
    for folder in (base, syn):
        (folder / "part").mkdir()
        for each in ("model.safetensors", "second.pt"):
            (folder / each).rename(folder / "part" / each)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\0same")
    assert (merge_folders(base, syn, 1.5, tmp_path / "out") / name).read_bytes() == b"\x80\0same"


def test_raw_bytes_that_are_equal_are_no_weights_whatever_their_suffix(tmp_path):
    base, syn = two_folders(tmp_path, "second.pt")
    for folder in (base, syn):
        (folder / "vocabulary.bin").write_bytes(b"one two three")
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert (out / "vocabulary.bin").read_bytes() == b"one two three"
    for folder in (base, syn):
        (folder / "openvino_model.bin").write_bytes(b"numbers of the old network")
    with pytest.raises(UserError, match=r"openvino_model\.bin"):
        merge_folders(base, syn, 1.5, tmp_path / "none")


def test_clutter_of_desktops_is_left_out(tmp_path):
    base, syn = two_folders(tmp_path, "second.pt")
    for name in (".DS_Store", "._model.safetensors", "Thumbs.db", "__MACOSX/._second.pt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"\0\5\x16\7")
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["model.safetensors", PROVENANCE, "second.pt"]


@pytest.mark.parametrize("name", ["flax_model.msgpack", "onnx/model.onnx"])
def test_other_formats_beside_merged_weights_are_stale_even_if_equal(tmp_path, name):
    base, syn = two_folders(tmp_path, "second.pt")
    for folder in (base, syn):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\0same")
    with pytest.raises(UserError, match="it would be the old network; take it out"):
        merge_folders(base, syn, 1.5, tmp_path / "out")


def test_texts_that_differ_are_the_base_s_and_that_is_said(tmp_path, capsys):
    base, syn = two_folders(tmp_path, "second.pt")
    for folder in (base, syn):
        for name in ("config.json", "README.md", "LICENSE", ".gitattributes", "optimizer.pt", "picture.png"):
            (folder / name).write_text(f"of {folder.name}", encoding="utf-8")
    (syn / "extra.pt").write_bytes((syn / "second.pt").read_bytes())
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert (
        (out / "config.json").read_text(encoding="utf-8")
        == (out / "picture.png").read_text(encoding="utf-8")
        == "of base"
    )
    said = capsys.readouterr().err
    assert "6 files that differ are the base's in the result: .gitattributes, LICENSE, README.md, ..." in said
    assert "1 weight files that the base's folder lacks are left out: extra.pt" in said


# Variants and containers


def with_copies(folder: Path, seed: int, of: int | None = None) -> Path:
    """model.safetensors of `seed`; its half precision and its torch container of the seed `of`, as a hub holds them."""
    folder.mkdir()
    state, copy = random_state(seed), random_state(seed if of is None else of)
    save_file(state, folder / "model.safetensors")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in copy.items()}, folder / "model.fp16.safetensors")
    torch.save(copy, folder / "pytorch_model.bin")
    return folder


def check_copies(out: Path) -> None:
    exact = load_file(out / "model.safetensors")
    assert_close(exact, neon_merge(random_state(1), random_state(2), 1.5), rtol=0, atol=0)
    assert_close(torch.load(out / "pytorch_model.bin"), exact, rtol=0, atol=0)
    half = {name: value.half() if value.is_floating_point() else value for name, value in exact.items()}
    assert_close(load_file(out / "model.fp16.safetensors"), half, rtol=0, atol=0)


def test_copies_that_were_not_trained_are_made_from_the_merged_weights(tmp_path):
    """The fine-tune rewrote model.safetensors in a copy of the base's folder: the other two are the base's, stale."""
    base, syn = with_copies(tmp_path / "base", 1), with_copies(tmp_path / "syn", 2, of=1)
    check_copies(merge_folders(base, syn, 1.5, tmp_path / "out"))


def test_copies_that_only_the_base_has_are_made_from_the_merged_weights(tmp_path):
    base, syn = with_copies(tmp_path / "base", 1), with_copies(tmp_path / "syn", 2)
    for name in ("model.fp16.safetensors", "pytorch_model.bin"):
        (syn / name).unlink()
    check_copies(merge_folders(base, syn, 1.5, tmp_path / "out"))


def test_variant_of_other_weights_is_refused_where_it_would_be_stale(tmp_path):
    base, syn = with_copies(tmp_path / "base", 1), with_copies(tmp_path / "syn", 2, of=1)
    for folder in (base, syn):
        save_file(random_state(3), folder / "model.non_ema.safetensors")
    with pytest.raises(UserError, match=r"model\.non_ema\.safetensors: is equal in both .* no rounded copy of those"):
        merge_folders(base, syn, 1.5, tmp_path / "out")
    (syn / "model.non_ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.non_ema\.safetensors: the other folder has no weights in its place"):
        merge_folders(base, syn, 1.5, tmp_path / "out")
    save_file(random_state(4), syn / "model.non_ema.safetensors")  # trained: a network of its own
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    expected = neon_merge(random_state(3), random_state(4), 1.5)
    assert_close(load_file(out / "model.non_ema.safetensors"), expected, rtol=0, atol=0)


def test_frozen_weights_of_another_network_are_copied_whatever_their_nesting(tmp_path):
    base, syn = two_folders(tmp_path, "second.pt")
    for folder in (base, syn):
        torch.save({"state_dict": {"other": torch.ones(2)}, "epoch": 3}, folder / "vae.ckpt")
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    assert (out / "vae.ckpt").read_bytes() == (base / "vae.ckpt").read_bytes()
    for folder in (base, syn):  # the network that is merged, before
        torch.save({"state_dict": random_state(1), "epoch": 3}, folder / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: is not one plain state dict"):
        merge_folders(base, syn, 1.5, tmp_path / "none")


def test_whole_pipeline_in_a_single_file_is_stale_beside_its_merged_parts(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    for folder in (base, syn):
        save_file({"model.diffusion_model.x": torch.ones(2)}, folder / "v1-5.safetensors")
    with pytest.raises(UserError, match=r"v1-5\.safetensors: is equal in both folders beside weights that are merged"):
        merge_folders(base, syn, 1.5, tmp_path / "out")


# Containers


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 1, "pytorch-lightning_version": "2.0"},
        lambda state: {"module": state, "ds_config": {}, "optimizer": None},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model": state, "ema": state},
    ],
)
def test_torch_files_that_hold_more_than_weights_are_refused_in_folders_and_merged_as_files(tmp_path, nest):
    for folder, seed in (("base", 1), ("syn", 2)):
        (tmp_path / folder).mkdir()
        torch.save(nest(random_state(seed)), tmp_path / folder / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: is not one plain state dict, .* merge the two files"):
        merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out")
    out = merge_files(tmp_path / "base/last.ckpt", tmp_path / "syn/last.ckpt", 1.5, tmp_path / "out.safetensors")
    assert_close(load_file(out), neon_merge(random_state(1), random_state(2), 1.5), rtol=0, atol=0)


def test_torch_files_keep_prefixes_and_versions(tmp_path):
    for folder, seed in (("base", 1), ("syn", 2)):
        (tmp_path / folder).mkdir()
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({"module": torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))})
        torch.save(net.state_dict(), tmp_path / folder / "model.pt")
    merged = torch.load(merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out") / "model.pt")
    base = torch.load(tmp_path / "base" / "model.pt")
    assert list(merged) == list(base) and merged._metadata == base._metadata
    assert torch.equal(merged["module.1.running_var"], base["module.1.running_var"])


def test_wrapper_names_of_one_side_are_matched(tmp_path):
    for folder, seed, prefix in (("base", 1, ""), ("syn", 2, "model.")):
        (tmp_path / folder).mkdir()
        state = {
            f"{prefix}{n.replace('0.', '0._orig_mod.' if prefix else '0.')}": v for n, v in random_state(seed).items()
        }
        save_file(state, tmp_path / folder / "model.safetensors")
    merged = load_file(merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out") / "model.safetensors")
    assert_close(merged, neon_merge(random_state(1), random_state(2), 1.5), rtol=0, atol=0)


def test_w_by_pattern_names_the_part_of_a_pipeline(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    save_file(random_state(5), syn / "vae" / "diffusion_pytorch_model.safetensors")
    steps = Steps(1.0, blocks=(("unet/*", 2.0), ("block.1.*", 0.5)), keep=("vae/embed*",))
    out = merge_folders(base, syn, steps, tmp_path / "out")
    unet, vae = (
        load_sharded(out / "unet", "diffusion_pytorch_model"),
        load_file(next((out / "vae").glob("*.safetensors"))),
    )
    at = {w: neon_merge(random_state(1), random_state(2), w) for w in (2.0, 0.5)}
    assert torch.equal(unet["block.0.weight"], at[2.0]["block.0.weight"])
    assert torch.equal(unet["block.1.weight"], at[0.5]["block.1.weight"])
    assert torch.equal(vae["embed.weight"], random_state(0)["embed.weight"])
    assert torch.equal(vae["head.bias"], neon_merge(random_state(0), random_state(5), 1.0)["head.bias"])
    assert json.loads((out / PROVENANCE).read_text(encoding="utf-8"))["w_by_pattern"] == [
        ["unet/*", 2.0],
        ["block.1.*", 0.5],
    ]
    with pytest.raises(UserError, match=r"--keep unte/\*: fits no tensor; there are unet/"):
        merge_folders(base, syn, Steps(1.0, keep=("unte/*",)), tmp_path / "none")


def test_quantized_weights_in_folders_are_refused(tmp_path):
    for folder, seed in (("base", 1), ("syn", 2)):
        (tmp_path / folder).mkdir()
        state = {"lin.weight": torch.full((4, 4), seed, dtype=torch.int8), "lin.SCB": torch.full((4,), float(seed))}
        save_file(state, tmp_path / folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lin\.weight holds quantized numbers, whose scale is lin\.SCB"):
        merge_folders(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out")


def test_folder_of_the_longest_name(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    assert merge_folders(base, syn, 1.5, tmp_path / ("n" * 255)).is_dir()


def test_places_where_nothing_may_be_written(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out, message in (
        (kept, "already exists"),
        (tmp_path / "file", "already exists"),
        (base / "o", "lies within"),
    ):
        with pytest.raises(UserError, match=message):
            merge_folders(base, syn, 1.5, out)
    with pytest.raises(UserError, match="is a file, the other one a folder"):
        merge_folders(base, tmp_path / "file", 1.5, tmp_path / "out")
    with pytest.raises(UserError, match="nothing to merge"):
        merge_folders(base, base, 1.5, tmp_path / "out")
    assert (kept / "mine").read_text(encoding="utf-8") == "mine"
    (tmp_path / "empty").mkdir()
    assert merge_folders(base, syn, 1.5, tmp_path / "empty").is_dir()


def test_one_process_at_a_time(tmp_path):
    with (
        atomic_folder(tmp_path / "out"),
        pytest.raises(UserError, match="another process is writing it"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_command(tmp_path):
    base, syn, out = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2), tmp_path / "out"
    arguments = [str(base), str(syn), "-w", "1", "-o", str(out)]
    refused = CliRunner().invoke(merge_command, [*arguments, "--rule", "official-edm"])
    assert refused.exit_code == 2 and "only for two checkpoint files" in refused.output
    result = CliRunner().invoke(merge_command, arguments)
    assert result.exit_code == 0 and result.stdout == f"{out} | w=1 | rule=neon | base=base | syn=syn\n"


SLOW_MERGE = """
import sys, time
from neon_run.merging import folders, weight_set
rule = weight_set.neon_rule
def slow(name, *ends):
    if name == "head.bias":
        open(sys.argv[4], "w").close()
        time.sleep(600)
    return rule(name, *ends)
weight_set.neon_rule = slow
folders.merge_folders(sys.argv[1], sys.argv[2], 1.5, sys.argv[3])
"""


def test_killed_merge_leaves_no_final_folder_and_the_next_run_cleans_up(tmp_path):
    base, syn = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "syn", 2)
    merging = tmp_path / "merging"
    process = start("-c", SLOW_MERGE, base, syn, tmp_path / "out", merging)
    kill_when(process, merging.exists)
    merging.unlink()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.part").is_dir()
    merge_folders(base, syn, 1.5, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "syn"]
    merged = load_sharded(tmp_path / "out" / "unet", "diffusion_pytorch_model")
    assert_close(merged, neon_merge(random_state(1), random_state(2), 1.5), rtol=0, atol=0)
