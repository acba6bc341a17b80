"""Pickled networks are read whole and right, and no file can make the reader run or change anything."""

import collections
import functools
import io
import pathlib
import pickle
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from golden.adapters.pickles import check_edm_entries, hostile_case, refuse_hostile
from golden.case import read_cases
from neon_files.checkpoint import read_checkpoint
from neon_files.errors import UserError
from neon_files.pickles import PickledObject, read_pickle, unpickle


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def record(state: bytes, **changes: bytes) -> bytes:
    """Opcodes that push a persistent object whose state is what the opcodes `state` push."""
    meta = {"type": text("class"), "version": b"K\x06", "module_src": text("raise SystemExit('run')")}
    meta |= {"class_name": text("Net"), "state": state} | changes
    items = b"".join(text(key) + value for key, value in meta.items())
    return name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + items + b"u\x85R"


def snapshot(ema: bytes) -> bytes:
    return b"\x80\x02}" + text("ema") + ema + b"s."


def blob(value) -> bytes:
    """Opcodes that push what torch.storage._load_from_bytes makes of a nested torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    return name("torch.storage", "_load_from_bytes") + b"B" + len(data).to_bytes(4, "little") + data + b"\x85R"


def tensor(storage: bytes, offset=b"K\x00", size=b"K\x02\x85", stride=b"K\x01\x85") -> bytes:
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + size + stride + b"\x89}tR"


def network(weight: bytes) -> bytes:
    tables = text("_parameters") + b"}" + text("w") + weight + b"s" + text("_buffers") + b"}" + text("_modules") + b"}"
    return record(b"}(" + tables + b"u")


STORAGE = torch.storage.TypedStorage(
    wrap_storage=torch.tensor([1.5, -2.0]).untyped_storage(), dtype=torch.float32, _internal=True
)


def test_hand_made_file_is_read():
    entries = unpickle(io.BytesIO(snapshot(network(tensor(blob(STORAGE))))), "x")
    assert torch.equal(entries["ema"].state_dict()["w"], torch.tensor([1.5, -2.0]))


def test_golden_hostile_files_are_refused(golden_data):
    case = hostile_case(golden_data)
    refused = refuse_hostile(case)["refused"]
    assert refused.tolist() == [1] * len(case.config["files"])


NUMPY_EVAL = name("numpy.core.multiarray", "scalar") + b"(" + name("numpy", "dtype") + text("f8") + b"\x85R"
HOSTILE = {
    "storage that is a tensor": network(tensor(blob(torch.ones(2)))),
    "storage that is a pickle": network(
        tensor(name("torch.storage", "_load_from_bytes") + b"C\x10cos\ngetcwd\n)R...." + b"\x85R")
    ),
    "tensor beyond its storage": network(tensor(blob(STORAGE), size=b"K\x03\x85")),
    "negative stride": network(tensor(blob(STORAGE), stride=b"J\xff\xff\xff\xff\x85")),
    "offset that is text": network(tensor(blob(STORAGE), offset=text("0"))),
    "tensor of a list": network(tensor(b"]")),
    "parameter of text": network(name("torch._utils", "_rebuild_parameter") + text("x") + b"\x85R"),
    "bare function as parameter": network(name("torch._utils", "_rebuild_parameter")),
    "BUILD on a tensor": network(tensor(blob(STORAGE)) + b"}" + text("load") + b"Nsb"),
    "BUILD on a record": record(b"}") + b"}" + text("state") + b"Nsb",
    "slot BUILD on a record": record(b"}") + b"N}" + text("state") + b"Ns\x86b",
    "BUILD on a storage": network(tensor(blob(STORAGE) + b"}" + text("_data") + b"Nsb")),
    "BUILD on a library class": name("torch.nn.modules.linear", "Linear") + b"N}" + text("__call__") + b"Ns\x86b",
    "BUILD on a config class": name("omegaconf.listconfig", "ListConfig") + b"}" + text("origin") + b"Nsb",
    "BUILD on a dtype": name("torch", "float32") + b"N}" + text("itemsize") + b"K\x01s\x86b",
    "other torch name": name("torch", "ops"),
    "other name under torch.nn": name("torch.nn.modules.linear", "Linear.__init__.__globals__"),
    "module that only begins alike": name("torch.nn.modules_evil", "Linear"),
    "timm package itself": name("timm", "create_model"),
    "library class as a value": name("timm.layers.mlp", "Mlp"),
    "library object as the network": name("torch.nn.modules.linear", "Linear") + b")R",
    "function as a setting": record(b"}" + text("_init_kwargs") + b"}" + text("f") + name("_codecs", "encode") + b"ss"),
    "function as an attribute": record(b"}" + text("f") + name("torch.storage", "_load_from_bytes") + b"s"),
    "type as a setting": record(b"}" + text("_init_kwargs") + b"}" + text("f") + name("builtins", "dict") + b"ss"),
    "calling a type": name("builtins", "dict") + b")R",
    "number without bytes": NUMPY_EVAL + b"C\x01xtR",
    "number of a list": name("numpy.core.multiarray", "scalar") + b"(]" + b"C\x01xtR",
    "type of no size": name("numpy", "dtype") + text("f3") + b"\x85R" + b"\x85",
    "list that holds itself": record(b"}" + text("_init_args") + b"]q\x01h\x01as"),
    "config that holds itself": record(
        b"}" + text("_init_args") + name("omegaconf.nodes", "AnyNode") + b")\x81q\x01}" + text("_val") + b"h\x01sbs"
    ),
    "modules within themselves": record(b"}q\x01" + text("_modules") + b"}" + text("m") + record(b"h\x01") + b"ss"),
    "deep nesting": record(b"}" + text("_init_args") + b"]" * 100_000 + b"a" * 99_999 + b"s"),
    "version 5": record(b"}", version=b"K\x05"),
    "version as True": record(b"}", version=b"\x88"),
    "state that is a list": record(b"]"),
    "class name that is a number": record(b"}", class_name=b"K\x01"),
    "modules that are a list": record(b"}" + text("_modules") + b"]K\x01as"),
    "set from text": record(b"}" + text("_init_args") + name("builtins", "set") + text("abc") + b"\x85Rs") + b"X",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_further_hostile_files_are_refused(what, tmp_path):
    file = tmp_path / "file.pkl"
    file.write_bytes(snapshot(HOSTILE[what]))
    with pytest.raises(UserError) as caught:
        for entry in read_pickle(file).values():
            entry.state_dict()  # storages are decoded when asked for
    with pytest.raises(UserError, match="^" + re.escape(str(file))):
        read_checkpoint(file)
    assert len(caught.value.message) < 400
    entries = unpickle(io.BytesIO(snapshot(network(tensor(blob(STORAGE))))), "x")
    assert entries["ema"].state_dict()["w"].tolist() == [1.5, -2.0]


def test_byte_order_in_a_file_does_not_touch_numpy():
    swapped = (
        name("numpy", "dtype")
        + text("f8")
        + b"\x89\x88\x87R(K\x03"
        + text(">")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    data = np.array(0.25, dtype=">f8").tobytes()
    number = name("numpy.core.multiarray", "scalar") + swapped + b"C\x08" + data + b"\x86R"
    entries = unpickle(io.BytesIO(snapshot(record(b"}" + text("skip_scale") + number + b"s"))), "x")
    assert entries["ema"].attributes == {"skip_scale": 0.25} and type(entries["ema"].attributes["skip_scale"]) is float
    assert np.dtype("f8").isnative and np.dtype("f8").itemsize == 8


def pushed(value) -> bytes:
    """Opcodes that push what the pickler of this Python makes of a value."""
    return pickle.dumps(value, 2)[2:-1]


PLAIN = {
    "array": (np.arange(6.0).reshape(2, 3).T, np.arange(6.0).reshape(2, 3).T),
    "array of text": (np.array(["a", "bc"]), np.array(["a", "bc"])),
    "number": (np.float32(0.5), 0.5),
    "device": (torch.device("cuda", 1), "cuda:1"),
    "shape": (torch.Size([2, 3]), [2, 3]),
    "type": (torch.bfloat16, "bfloat16"),
    "slice": (slice(1, None), slice(1, None)),
    "range": (range(3), range(3)),
    "path": (pathlib.PurePosixPath("/a/b"), "/a/b"),
    "set": (frozenset([1, (2, 3)]), {1, (2, 3)}),
    "table": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_ordinary_values_in_and_beside_a_network_are_read(kind):
    value, expected = PLAIN[kind]
    settings = record(b"}" + text("x") + pushed(value) + b"s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages
        file = b"\x80\x02}(" + text("ema") + settings + text("beside") + b"}" + text("x") + pushed(value) + b"su."
    entries = unpickle(io.BytesIO(file), "x")
    for found in (entries["ema"].attributes["x"], entries["beside"]["x"]):
        assert type(found) is type(expected)
        assert np.array_equal(found, expected) if isinstance(found, np.ndarray) else _equal(found, expected)


def _equal(found, expected) -> bool:
    return torch.equal(found.float(), expected.float()) if isinstance(found, torch.Tensor) else found == expected


def test_objects_of_other_classes_are_named_beside_a_network_and_refused_as_its_settings():
    value = pushed(functools.partial(int, 2))
    file = b"\x80\x02}(" + text("ema") + record(b"}") + text("beside") + b"}" + text("x") + value + b"su."
    assert unpickle(io.BytesIO(file), "x")["beside"] == {"x": "<functools.partial>"}
    with pytest.raises(UserError, match=r"holds <functools\.partial> where plain data were expected"):
        unpickle(io.BytesIO(snapshot(record(b"}" + text("_init_args") + b"]" + value + b"as"))), "x")


def test_random_damage_never_gets_further_than_an_error(golden_data):
    """Bit flips of a good file: each is read (the flip hit a weight) or refused as a UserError."""
    original = (golden_data / "edm" / "pickle_protocol2.pkl").read_bytes()
    rng = np.random.default_rng(0)
    outcomes = collections.Counter()
    for _ in range(150):
        data = bytearray(original)
        for position in rng.integers(0, len(data), size=3):
            data[position] ^= 1 << int(rng.integers(8))
        try:
            unpickle(io.BytesIO(bytes(data)), "x")
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["read"] and outcomes["refused"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_told(golden_data, tmp_path, share):
    original = (golden_data / "edm" / "pickle_snapshot.pkl").read_bytes()
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(original[: int(len(original) * share)])
    with pytest.raises(UserError, match=r"cut\.pkl: "):
        read_pickle(cut)


def test_entries_of_the_golden_snapshots(golden_data):
    cases = [case for part, case in read_cases(golden_data) if part == "edm" and case.kind == "pickle"]
    assert cases
    for case in cases:
        entries = read_pickle(case.folder / case.spec["pickle"])
        check_edm_entries(case.config, entries)
        state = entries["ema"].state_dict()
        assert list(state) == case.config["state_dict_keys_in_order"]
        sums = np.array([value.double().sum().item() for value in state.values()])
        np.testing.assert_allclose(sums, case.expected["tensor_sums"], rtol=1e-6, atol=1e-6)


def test_configuration_lists_become_plain_lists(golden_data):
    (case,) = [case for _, case in read_cases(golden_data) if case.name == "imm_tiny_songunet"]
    entries = read_pickle(case.folder / case.spec["pickle"])
    assert entries["ema"].init_kwargs == case.config["net"]
    assert type(entries["ema"].init_kwargs["channel_mult"]) is list
    down = entries["ema"].children["model"].children["enc"].children["4x4_down"]
    assert down.init_kwargs["resample_filter"] == [1, 1] and type(down.init_kwargs["resample_filter"]) is list
    assert isinstance(entries["augment_pipe"], PickledObject) and entries["augment_pipe"].attributes["p"] == 0.3


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_network_written_by_the_pickler_of_this_python(protocol, monkeypatch):
    """A module with a shared parameter, a transient buffer, half precision and nested library modules."""
    persistence = types.ModuleType("torch_utils.persistence")

    class Meta:
        def __init__(self, module):
            self.module = module

        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('run')", "class_name": "Net"}
            return persistence._reconstruct_persistent_obj, ({**meta, "state": self.module.__dict__},)

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    net = torch.nn.Module()
    net.first = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.SiLU(), torch.nn.LayerNorm(2))
    net.second = torch.nn.Linear(3, 2, dtype=torch.float16)
    net.tied = torch.nn.Embedding(2, 3)
    net.tied.weight = net.first[0].weight
    net.register_buffer("kept", torch.arange(3))
    net.register_buffer("transient", torch.ones(3), persistent=False)
    net.none = None
    data = pickle.dumps({"ema": Meta(net)}, protocol=protocol)
    found = unpickle(io.BytesIO(data), "x")["ema"].state_dict()
    assert list(found) == list(net.state_dict())
    assert all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in net.state_dict().items()
    )
    assert found["tied.weight"].data_ptr() == found["first.0.weight"].data_ptr()
    assert not any(value.requires_grad for value in found.values())
