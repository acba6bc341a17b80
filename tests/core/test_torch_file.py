"""Torch files, zip and legacy: right numbers or one sentence, whatever lies beside them, however they were packed."""

import argparse
import collections
import dataclasses
import datetime
import enum
import fractions
import functools
import io
import logging
import pathlib
import pickle
import re
import uuid
import warnings
import zipfile

import numpy as np
import pytest
import torch
from launch import own_group
from needs import OPTIONAL_CHECKSUMS, SAVED_UINT16, STORED_COMPLEX, STORED_UINT16
from safetensors.torch import load_file, save_file
from torch import nn

from neon_files.checkpoint import is_finite, open_checkpoint, read_checkpoint, write_checkpoint
from neon_files.errors import UserError

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def same(state: dict, expected: dict = STATE) -> bool:
    return list(state) == list(expected) and all(
        state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in expected.items()
    )


@dataclasses.dataclass
class Config:
    depth: int = 2


class Kind(enum.Enum):
    A = 1


class Outer:
    class Inner(enum.IntEnum):
        B = 2


def trained() -> dict:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


BESIDE = {
    "NumPy numbers": [np.float64(2.5), np.float32(2.5), np.int64(2), np.bool_(True), np.str_("a")],
    "NumPy arrays": [np.arange(3.0), np.array(["a"]), np.array([None]), np.zeros(2, "datetime64[s]"), np.zeros(0)],
    "NumPy generators": [np.random.RandomState(0).get_state(), np.random.default_rng(0), np.random.RandomState(0)],
    "paths": [pathlib.Path("x"), pathlib.PureWindowsPath("c:/x"), argparse.Namespace(out=pathlib.Path("x"))],
    "dates": [
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        datetime.timedelta(1),
        datetime.date(1, 1, 1),
    ],
    "collections": [
        collections.defaultdict(list, a=[1]),
        collections.defaultdict(int),
        [int, str, bytes, type(None)],
        collections.Counter("ab"),
        collections.deque([1]),
    ],
    "libraries' objects": [re.compile("a"), logging.getLogger("a"), nn.functional.gelu, nn.functional.relu],
    "own classes": [Config(), Kind.A, Outer.Inner.B, [Config] * 3],
    "plain values": [slice(1, 2), range(3), 1j, b"x", bytearray(b"x"), {1, 2}, frozenset([1]), ..., 1 << 200],
    "numbers and ids": [fractions.Fraction(1, 2), uuid.UUID(int=1), functools.partial(Config, 3)],
    "torch's own": [torch.device("cuda", 1), torch.Size([2]), torch.float16, torch.get_rng_state()],
    "a whole module": [nn.Sequential(nn.Linear(2, 2), nn.GELU())],
    "an optimizer's state": [trained()],
}


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_weights_does_not_matter(tmp_path, kind, protocol, is_zip):
    content = {"model": STATE, "beside": BESIDE[kind], "args": {"x": BESIDE[kind][0]}, "epoch": np.int64(3)}
    options = {"_use_new_zipfile_serialization": is_zip, "pickle_protocol": protocol}
    torch.save(content, tmp_path / "x", **options)
    checkpoint = read_checkpoint(tmp_path / "x")
    assert same(checkpoint.state)
    assert checkpoint.metadata == {"epoch": 3} and type(checkpoint.metadata["epoch"]) is int
    for value in BESIDE[kind]:  # within the state dict itself too, where it is left out
        torch.save(STATE | {"extra": value}, tmp_path / "x", **options)
        if not isinstance(value, torch.Tensor | dict):
            assert same(read_checkpoint(tmp_path / "x").state)


class Asks:
    """Its pickle asks the reader to call something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize("function", [eval, exec, print, open, torch.load, np.load, pickle.loads, io.open, __import__])
def test_functions_are_refused_and_not_called(tmp_path, function, is_zip):
    marker = tmp_path / "marker"
    content = {"model": STATE, "beside": Asks(function, f"open({str(marker)!r}, 'w').close()")}
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="refused, nothing in it was run: the pickle names"):
        read_checkpoint(tmp_path / "x")
    assert not marker.exists()


class OwnTensor(torch.Tensor):
    pass


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


UNREADABLE = {
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a sparse tensor ": lambda: torch.eye(2).to_sparse_csr(),
    "on the meta device": lambda: torch.ones(2, device="meta"),
    "quantized": quantized,
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
    "a tensor of the class": lambda: torch.ones(2).as_subclass(OwnTensor),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reason", UNREADABLE)
def test_tensors_without_plain_numbers_are_refused_by_name(tmp_path, reason):
    torch.save({"state_dict": STATE | {"block.odd": UNREADABLE[reason]()}}, tmp_path / "x")
    with pytest.raises(UserError, match=rf"x: block\.odd is {reason.strip()}.*save it as an ordinary tensor") as caught:
        read_checkpoint(tmp_path / "x")
    assert "\n" not in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_one_ranks_part_of_a_distributed_tensor_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    with own_group():
        mesh = init_device_mesh("cpu", (1,))
        part = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], shape=torch.Size([4, 3]), stride=(3, 1))
        torch.save(STATE | {"w": part}, tmp_path / "x")
    with pytest.raises(UserError, match=r"w is one rank's part of a distributed tensor \(DTensor\)"):
        read_checkpoint(tmp_path / "x")


def with_attribute(value: torch.Tensor) -> torch.Tensor:
    value.note = "trained"
    return value


KINDS = {
    "float8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "float8 e5m2": torch.tensor([1.5, -2.0]).to(torch.float8_e5m2),
    "complex": torch.tensor([1 + 2j, 3.0]),
    "whole numbers": torch.tensor([1, 65535], dtype=torch.uint16),
    "scalar": torch.tensor(3),
    "nothing": torch.zeros(0, 3),
    "not contiguous": torch.arange(6.0).reshape(2, 3).t()[1:],
    "strided": torch.arange(16.0)[1::3],
    "expanded": torch.ones(1).expand(1000),
    "parameter": nn.Parameter(torch.ones(2)),
    "buffer": nn.Buffer(torch.ones(2)),
    "with an attribute": with_attribute(torch.ones(3)),
    "parameter with an attribute": with_attribute(nn.Parameter(torch.ones(1))),
}


def kinds(**marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """A test of each kind; `marks` of those that stand for a dtype."""
    return pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=marks.get(str(KINDS[name].dtype)[6:], ())) for name in KINDS]
    )


def same_numbers(found: torch.Tensor, value: torch.Tensor) -> bool:
    if found.dtype != value.dtype or found.shape != value.shape:
        return False
    return found.contiguous().view(-1).view(torch.uint8).equal(value.detach().contiguous().view(-1).view(torch.uint8))


@FORMATS
@kinds(uint16=SAVED_UINT16)
def test_every_kind_of_numbers(tmp_path, is_zip, kind):
    torch.save({kind: KINDS[kind]}, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    assert open_checkpoint(tmp_path / "x").layout() == {kind: (KINDS[kind].dtype, tuple(KINDS[kind].shape))}
    found = read_checkpoint(tmp_path / "x").state[kind]
    assert same_numbers(found, KINDS[kind]) and not found.requires_grad


@FORMATS
def test_views_that_torch_has_not_written_out(tmp_path, is_zip):
    conj, neg = (torch.tensor([1 + 2j, 3 - 1j]).conj() for _ in range(2))
    torch.save({"conj": conj, "neg": neg.imag}, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    state = read_checkpoint(tmp_path / "x").state
    assert state["conj"].tolist() == [1 - 2j, 3 + 1j] and state["neg"].tolist() == [-2.0, 1.0]


@FORMATS
def test_tied_weights_share_memory(tmp_path, is_zip):
    torch.save(
        {"a": STATE["a.weight"], "b": STATE["a.weight"].t()}, tmp_path / "x", _use_new_zipfile_serialization=is_zip
    )
    state = read_checkpoint(tmp_path / "x").state
    assert state["a"].data_ptr() == state["b"].data_ptr() and torch.equal(state["b"], state["a"].t())


@kinds(complex64=STORED_COMPLEX, uint16=STORED_UINT16)
def test_safetensors_of_every_kind(tmp_path, kind):
    """Written by us and by the library; each reads the other's."""
    value = KINDS[kind].detach().contiguous()
    save_file({kind: value}, tmp_path / "theirs")
    write_checkpoint(tmp_path / "ours", {kind: value})
    assert same_numbers(load_file(tmp_path / "ours")[kind], value)
    assert all(same_numbers(read_checkpoint(tmp_path / name).state[kind], value) for name in ("theirs", "ours"))


def test_complex_numbers_must_be_finite_too():
    assert is_finite(torch.tensor([1 + 2j])) and not is_finite(torch.tensor([1 + 1j * torch.inf]))


def test_placeholders_of_deepspeed_are_no_weights(tmp_path):
    """With ZeRO 3 every rank's file has the names, and tensors of no elements."""
    for state, message in ((STATE, None), (STATE | {"w": torch.zeros(0)}, r"w is empty.*zero_to_fp32\.py")):
        torch.save({"module": state, "ds_version": "0.15", "ds_config": {"a": 1}, "optimizer": None}, tmp_path / "x")
        if message is None:
            assert same(read_checkpoint(tmp_path / "x").state)
        else:
            with pytest.raises(UserError, match=message):
                read_checkpoint(tmp_path / "x")


# Archives


def rezip(path: pathlib.Path, method: int, prefix: str = "") -> None:
    """As somebody does who unpacks a torch file and packs it again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(prefix + name, data)


@pytest.mark.parametrize("prefix", ["", "x", "folder/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED], ids=["deflated", "stored"])
def test_archive_that_was_packed_again(tmp_path, method, prefix):
    state = STATE | {"zeros": torch.zeros(5000), "whole": torch.arange(7), "flags": torch.tensor([True])}
    torch.save({"model": state}, tmp_path / "x")
    rezip(tmp_path / "x", method, prefix)
    assert same(read_checkpoint(tmp_path / "x").state, state)


def test_flipped_bit_is_noticed_when_the_tensor_is_read(tmp_path):
    value = torch.arange(1000.0)
    torch.save({"other": torch.ones(3), "w": value}, tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    data[data.find(value.numpy().tobytes()) + 2] ^= 0x40
    (tmp_path / "x").write_bytes(data)
    weights = open_checkpoint(tmp_path / "x")
    assert weights.layout()["w"] == (torch.float32, (1000,)) and weights.loaders["other"]().tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"x: w: its member x/data/1 differs from its checksum"):
        weights.loaders["w"]()


@OPTIONAL_CHECKSUMS
def test_archive_saved_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(tmp_path / "x").state)


def edit(path: pathlib.Path, change) -> None:
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # about the duplicate
        for name, data in change(members):
            archive.writestr(name, data)


ARCHIVES = {
    "two members have one name": lambda members: [*members, members[0]],
    "big-endian": lambda members: [(n, b"big" if n.endswith("byteorder") else d) for n, d in members],
    "its storage 0 are missing": lambda members: [(n, d) for n, d in members if not n.endswith("data/0")],
    "its storage 1 are missing": lambda members: [(n, d[:2] if n.endswith("data/1") else d) for n, d in members],
    "several torch files": lambda members: [*members, ("second/data.pkl", b"}.")],
    "would unpack to": lambda members: [*members, ("zeros", bytes(600 << 20))],
    "TorchScript": lambda members: [*members, ("x/constants.pkl", b"")],
    "not one of torch": lambda members: [(n, d) for n, d in members if not n.endswith("data.pkl")],
}


@pytest.mark.parametrize("message", ARCHIVES)
def test_odd_archives_are_told(tmp_path, message):
    edit(tmp_path / "x", ARCHIVES[message])
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(tmp_path / "x")
    assert caught.value.message.startswith(str(tmp_path / "x"))
