"""Every published container, nesting and prefix gives the same state dict; whatever is wrong is told in one line."""

import argparse
import io
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neon_files.checkpoint import find_file, load_strict, read_checkpoint, write_checkpoint
from neon_files.errors import UserError


def make_network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    net.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1))
    return net


STATE = make_network().state_dict()
OTHER = {name: torch.zeros_like(value) for name, value in STATE.items()}


def prefixed(prefix: str) -> dict:
    return {prefix + name: value for name, value in STATE.items()}


NESTINGS = {
    "flat": STATE,
    "trainer.var_wo_ddp": {"epoch": 1, "trainer": {"config": {"a": 1}, "var_wo_ddp": STATE, "vae_local": OTHER}},
    "var_wo_ddp": {"var_wo_ddp": STATE},
    "model": {"model": STATE},
    "model_ema": {"model_ema": STATE, "epoch": 3},
    "state_dict": {"state_dict": STATE},
    "state_dict.model": {"state_dict": {"model": STATE}},
    "averaged before raw": {"model": OTHER, "model_ema": STATE, "optimizer": {"lr": 1.0}},
    "ema": {"ema": STATE, "net": OTHER},
    "command line beside it": {"model": STATE, "args": argparse.Namespace(lr=1e-4)},
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled in DDP": prefixed("module._orig_mod."),
    "DDP in compiled": {"model": prefixed("_orig_mod.module.")},
}


def same(found: dict, expected: dict = STATE) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nestings_and_prefixes(tmp_path, nesting, new_format):
    path = tmp_path / "file.bin"  # the name says nothing
    torch.save(NESTINGS[nesting], path, _use_new_zipfile_serialization=new_format)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state)
    assert checkpoint.container == ("torch" if new_format else "torch-legacy")


def test_choice_of_averaged_weights_is_said_and_can_be_changed(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"model": OTHER, "model_ema": STATE, "epoch": 7}, path)
    checkpoint = read_checkpoint(path)
    assert "averaged weights 'model_ema', not 'model'" in capsys.readouterr().err
    assert same(checkpoint.state) and checkpoint.metadata == {"epoch": 7}
    assert same(read_checkpoint(path, entry="model").state, OTHER)
    with pytest.raises(UserError, match=r"no entry 'theirs'; it has model, model_ema, epoch"):
        read_checkpoint(path, entry="theirs")


def test_a_module_named_like_a_prefix_keeps_its_name(tmp_path):
    state = {"module.a": torch.ones(1), "head": torch.ones(1)}
    torch.save(state, tmp_path / "x")
    assert list(read_checkpoint(tmp_path / "x").state) == list(state)


def test_pickle_gives_configuration_and_other_entries(golden_data):
    checkpoint = read_checkpoint(golden_data / "edm" / "pickle_ema_only_cuda.pkl")
    assert checkpoint.container == "pickle"
    assert checkpoint.config["class"] == "EDMPrecond" and checkpoint.config["args"] == [8, 3]
    assert checkpoint.metadata["attributes"]["sigma_data"] == 0.5
    assert checkpoint.metadata["modules"]["model"]["kwargs"]["resample_filter"] == [1, 3, 3, 1]
    snapshot = read_checkpoint(golden_data / "edm" / "pickle_snapshot.pkl")
    assert (
        snapshot.metadata["loss_fn"]["class"] == "EDMLoss" and snapshot.metadata["dataset_kwargs"]["max_size"] == 6000
    )
    with pytest.raises(UserError, match="has no network 'net'"):
        read_checkpoint(golden_data / "edm" / "pickle_snapshot.pkl", entry="net")


def test_what_we_write_comes_back(tmp_path):
    state = {
        "z.half": torch.tensor([1.0, -torch.inf, 65504.0], dtype=torch.float16),
        "a": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        "bf16": torch.randn(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    state["shared"] = state["a"]
    config, metadata = {"class": "Net", "kwargs": {"depth": 2}}, {"w": 1.5, "seeds": "0-9", "nested": {"x": [1, None]}}
    write_checkpoint(tmp_path / "x", state, config, metadata)
    checkpoint = read_checkpoint(tmp_path / "x")
    assert (checkpoint.container, checkpoint.config, checkpoint.metadata) == ("safetensors", config, metadata)
    assert same(checkpoint.state, state)
    assert {name: value.dtype for name, value in checkpoint.state.items()} == {n: v.dtype for n, v in state.items()}
    assert same(dict(sorted(load_file(tmp_path / "x").items())), dict(sorted(state.items())))  # the library agrees
    with pytest.raises(UserError, match=r"x: z has the type torch\.complex128"):
        write_checkpoint(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})
    assert same(read_checkpoint(tmp_path / "x").state, state)


def test_foreign_safetensors(tmp_path):
    save_file({name: value.contiguous() for name, value in STATE.items()}, tmp_path / "x", metadata={"format": "pt"})
    checkpoint = read_checkpoint(tmp_path / "x")
    assert set(checkpoint.state) == set(STATE) and checkpoint.metadata == {"format": "pt"} and checkpoint.config is None


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_changing_what_was_read_does_not_change_the_file(tmp_path, container):
    path = tmp_path / "x"
    torch.save(STATE, path) if container == "torch" else write_checkpoint(path, STATE)
    before = path.read_bytes()
    for value in read_checkpoint(path).state.values():
        value.zero_()
    assert path.read_bytes() == before and same(read_checkpoint(path).state)


# Wrong files


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


class Hostile:
    """What a file might ask of whoever opens it."""

    def __reduce__(self):
        return os.getcwd, ()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(3))
    return buffer.getvalue()


WRONG = {
    "empty": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><title>404</title>", "web page"),
    "error document": (b"<?xml version='1.0'?><Error/>", "web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "tar": (bytes(200) + b"x" * 57 + b"ustar\x00" + bytes(99), "is a tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive.*unpack"),
    "array": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "text": (b"hello, this is a readme of some kind", "not a recognised weight file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a recognised weight file"),
    "hole": (bytes(4096), "unfinished download"),
    "reference statistics": (numpy_archive(), "NumPy archive"),
    "zip": (zipped("readme.txt"), "not one of torch"),
    "list": (saved([1, 2]), "holds a list, not a state dict"),
    "tensor": (saved(torch.ones(2)), "holds a Tensor, not a state dict"),
    "numbers only": (saved({"epoch": 1, "lr": 0.1}), "no weights found; it has epoch, lr"),
    "empty nest": (saved({"model": {}}), "no weights found; its entry 'model' has nothing"),
    "two meanings": (saved({"a": torch.ones(1), "theirs": {"a": torch.ones(1)}}), "which is ambiguous"),
    "code": (saved({"model": STATE, "x": Hostile()}), "refused, nothing in it was run: the pickle names posix.getcwd"),
    "code, legacy": (saved({"model": STATE, "x": Hostile()}, _use_new_zipfile_serialization=False), "posix.getcwd"),
    "module": (
        saved({"net": nn.Linear(1, 1)}),
        "nothing in it was run: net is a pickled torch.nn.modules.linear.Linear",
    ),
    "header too long": (struct.pack("<Q", 1 << 60) + b"{" + bytes(100), "not a whole safetensors file"),
    "header no JSON": (struct.pack("<Q", 8) + b"{-------" + bytes(100), "not a whole safetensors file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_told(tmp_path, what):
    content, message = WRONG[what]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert caught.value.message.startswith(str(path)) and "\n" not in caught.value.message


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.97, 0.9999])
@pytest.mark.parametrize("container", ["torch", "legacy", "safetensors"])
def test_truncated_files_are_told(tmp_path, container, share):
    path, state = tmp_path / "x.pth", {"w": torch.ones(300), "b": torch.ones(40)}
    if container == "safetensors":
        write_checkpoint(path, state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "torch")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert caught.value.message.startswith(str(path))


def test_folder_and_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe")


# Names


def test_other_spelling_beside_it_is_found_and_said(tmp_path, capsys):
    """The README's Neon_IMM_imagenet256.pth is published as Neon_imm_imagenet256.pkl."""
    published = tmp_path / "Neon_imm_imagenet256.pkl"
    torch.save(STATE, published)
    asked = tmp_path / "Neon_IMM_imagenet256.pth"
    assert same(read_checkpoint(asked).state)
    said = capsys.readouterr().err
    assert str(asked) in said and f"using {published}" in said
    torch.save(OTHER, asked)
    assert same(read_checkpoint(asked).state, OTHER) and capsys.readouterr().err == ""


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"a\.pth: does not exist; .*bash download_models\.sh"):
        find_file(tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not exist"):
        find_file(tmp_path / "nowhere" / "a.pth")
    (tmp_path / "a.PTH").touch(), (tmp_path / "a.pkl").touch()
    with pytest.raises(UserError, match=r"name one of .*a\.PTH, .*a\.pkl"):
        find_file(tmp_path / "a.pth")


# Loading


def test_strict_load_in_place_and_on_the_meta_device(tmp_path):
    write_checkpoint(tmp_path / "x", STATE)
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
            net.register_buffer("mask", torch.zeros(4, 4))
        net[2].weight.requires_grad_(False)
        load_strict(net, read_checkpoint(tmp_path / "x"))
        assert same(net.state_dict())
        assert net[0].weight.requires_grad and not net[2].weight.requires_grad
        assert isinstance(net[0].weight, nn.Parameter)


def test_mismatch_lists_names_and_changes_nothing(tmp_path):
    state = {name: value + 1 for name, value in STATE.items() if name != "1.bias"}
    state["0.weight"] = torch.ones(4, 2)
    state |= {f"extra{i}": torch.ones(1) for i in range(5)}
    write_checkpoint(tmp_path / "x", state)
    net = make_network()
    with pytest.raises(UserError) as caught:
        load_strict(net, read_checkpoint(tmp_path / "x"))
    message = caught.value.message
    assert "does not fit Sequential" in message and "1 of 9 keys missing in the file (1.bias)" in message
    assert "5 keys only in the file (extra0, extra1, extra2, ...)" in message
    assert "1 of another shape (0.weight: [4, 3] in the network, [4, 2] in the file)" in message
    assert same(net.state_dict())


def test_named_surplus_may_be_ignored(tmp_path):
    write_checkpoint(tmp_path / "x", STATE | {"loss.a": torch.ones(1), "model_ema.b": torch.ones(1)})
    checkpoint = read_checkpoint(tmp_path / "x")
    with pytest.raises(UserError, match="2 keys only in the file"):
        load_strict(make_network(), checkpoint)
    load_strict(make_network(), checkpoint, ignore=("loss.", "model_ema."))


def test_numbers_take_the_type_of_the_network(tmp_path):
    """The official VAR merge writes whole-number buffers as float32."""
    state = {name: value.double() for name, value in STATE.items()}
    write_checkpoint(tmp_path / "x", state)
    for device in ("cpu", "meta"):
        net = make_network().to(device)
        load_strict(net, read_checkpoint(tmp_path / "x"))
        assert net[1].num_batches_tracked.dtype == torch.int64 and net[0].weight.dtype == torch.float32
        assert same(net.state_dict())
    write_checkpoint(tmp_path / "x", state | {"1.num_batches_tracked": torch.tensor(0.5)})
    with pytest.raises(UserError, match=r"1\.num_batches_tracked should hold whole numbers"):
        load_strict(make_network(), read_checkpoint(tmp_path / "x"))


def test_complex_numbers_do_not_become_real_ones(tmp_path):
    write_checkpoint(tmp_path / "x", STATE | {"2.weight": torch.ones(2, 4, dtype=torch.complex64)})
    with pytest.raises(UserError, match=r"2\.weight holds complex numbers, the network has torch\.float32"):
        load_strict(make_network(), read_checkpoint(tmp_path / "x"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_parameter_that_is_not_finite_is_named_but_a_mask_is_not(tmp_path, value):
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["0.weight"][1, 2] = value
    write_checkpoint(tmp_path / "x", state)
    with pytest.raises(UserError, match=r"0\.weight holds numbers that are not finite"):
        load_strict(make_network(), read_checkpoint(tmp_path / "x"))
    load_strict(make_network(), read_checkpoint(tmp_path / "x"), allow_nonfinite=True)


def test_large_finite_numbers_are_finite(tmp_path):
    state = STATE | {"0.weight": torch.full((4, 3), 3e38)}  # their sum overflows
    write_checkpoint(tmp_path / "x", state)
    load_strict(make_network(), read_checkpoint(tmp_path / "x"))
