"""Whatever the bytes of a weight file are: read, or one sentence; in bounded time and memory; nothing is executed."""

import contextlib
import io
import json
import pickle
import pickletools
import resource
import signal
import struct
import sys
import time
import types
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

from neon_files.checkpoint import open_checkpoint, pack_metadata
from neon_files.errors import UserError

SECONDS = 10  # of the processor
MEMORY = 1 << 30  # bytes beyond what the test process has
FORBIDDEN = ("pickle.find_class", "os.", "subprocess.", "shutil.", "socket.", "ctypes.", "webbrowser.")
ALLOWED = ("os.listdir", "os.scandir")

watching, seen = False, []


def watch(event: str, args: tuple) -> None:
    if watching:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or (event.startswith(FORBIDDEN) and event not in ALLOWED):
            seen.append(event)


class TookTooLong(BaseException):
    """Not an Exception, which the readers turn into a sentence."""


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Raises where what is within takes too long, or does what a reader does not; memory is limited."""
    global watching

    def stop(*_):
        raise TookTooLong

    if watch not in installed:
        installed.append(watch)
        sys.addaudithook(watch)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    seen.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
    assert not seen, f"a reader did {seen[:5]}"


installed: list[Callable] = []


def outcome(path: Path) -> str:
    """ "read", or the sentence that says why not. Fails for every other end."""
    with bounds():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weights = open_checkpoint(path)
                layout = weights.layout()
                for name, load in weights.loaders.items():
                    tensor = load()
                    assert (tensor.dtype, tuple(tensor.shape)) == layout[name]
                pack_metadata(weights.config, weights.metadata)
            return "read"
        except UserError as error:
            message = error.message
    assert message.startswith(str(path)) and len(message) < 1500 and "\n" not in message, message
    assert "asks for more memory" not in message, message
    return message.removeprefix(f"{path}: ")


# Files made to fill time or memory


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def network(state: bytes) -> bytes:
    """A pickled snapshot whose network has the attributes that the opcodes `state` push as items."""
    meta = {"type": text("class"), "version": b"K\x06", "module_src": text(""), "class_name": text("Net")}
    items = b"".join(text(key) + value for key, value in (meta | {"state": b"}(" + state + b"u"}).items())
    record = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + items + b"u\x85R"
    return b"\x80\x02}" + text("ema") + record + b"s."


def torch_zip(pickled: bytes, members: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in (members or {}).items():
            archive.writestr(f"x/{name}", data)
    return buffer.getvalue()


def doubled(start: bytes, again: Callable[[bytes], bytes], times: int = 100) -> bytes:
    """Each value holds the one before it twice, so that it stands for 2**times in a few bytes each."""
    code = start + b"q\x00"
    for i in range(times):
        code += b"0" + again(b"h" + bytes([i])) + b"q" + bytes([i + 1])
    return code


LINEAR = b"ctorch.nn.modules.linear\nLinear\n)\x81"
LISTS = doubled(b"]K\x01a", lambda one: b"](" + one + one + b"e")
TUPLES = doubled(b"K\x01\x85", lambda one: one + one + b"\x86")
MODULES = doubled(
    LINEAR, lambda one: LINEAR + b"}" + text("_modules") + b"}(" + text("a") + one + text("b") + one + b"usb"
)
WEIGHT = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
)


def lazy(numel: int, size: bytes, stride: bytes, flags: bytes = b"") -> bytes:
    return WEIGHT + b"J" + struct.pack("<i", numel) + b"tQK\x00" + size + stride + b"\x89}" + flags + b"tR"


def safetensors(header: str | bytes, data: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def claims(member: str, size: int) -> bytes:
    """An archive whose directory says that `member` unpacks to `size` bytes."""
    weights = b"}" + text("w") + lazy(4, b"K\x04\x85", b"K\x01\x85") + b"s."
    data = bytearray(torch_zip(weights, {"data/0": bytes(16)}, zipfile.ZIP_DEFLATED))
    at = data.rfind(f"x/{member}".encode())
    data[at - 22 : at - 18] = struct.pack("<I", size)
    return bytes(data)


BOMBS = {
    "shared lists as settings": network(text("_init_args") + LISTS),
    "shared lists as an attribute": network(text("x") + LISTS),
    "shared tuples as a key": network(text("x") + b"}" + TUPLES + b"Ns"),
    "shared tuples in a set": network(text("x") + b"c__builtin__\nset\n](" + TUPLES + b"e\x85R"),
    "shared modules": network(text("_modules") + b"}" + text("m") + MODULES + b"s"),
    "shared lists in a torch file": torch_zip(b"\x80\x02}" + text("model") + LISTS + b"s."),
    "shared lists beside weights": torch_zip(b"\x80\x02}" + text("x") + LISTS + b"s" + text("model") + b"}s."),
    "shared key in a torch file": torch_zip(b"\x80\x02}" + TUPLES + b"Ns."),
    "dictionary of itself": torch_zip(b"\x80\x02}q\x00" + text("model") + b"h\x00s."),
    "list of itself": torch_zip(b"\x80\x02}" + text("ema") + b"]q\x00h\x00as."),
    "millions of steps": b"\x80\x02" + b"N0" * 4_000_000 + b"}.",
    "deep lists": b"\x80\x02}" + text("ema") + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "deep dictionaries": torch_zip(b"\x80\x02" + (b"}" + text("model")) * 50_000 + b"}" + b"s" * 50_000 + b"."),
    "one list copied again and again": b"\x80\x02]q\x00("
    + b"N" * 99_000
    + b"e0"
    + b"c__builtin__\nset\nh\x00\x85R0" * 9_999
    + b"}.",
    "one text copied again and again": b"\x80\x02"
    + text("x" * 999_999)
    + b"q\x000"
    + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 20_000
    + b"}.",
    "one long attribute again and again": network(
        text("x") + b"]q\x01(" + text("x" * 999_999) + b"q\x00" + b"h\x00" * 200_000 + b"e"
    ),
    "number of many digits": b"\x80\x02L" + b"9" * 60_000 + b"L\n.",
    "number of many bytes": b"\x80\x02\x8b" + struct.pack("<i", 9_999_999) + b"\x7f" * 9_999_999 + b".",
    "numbers whose hashes collide": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + ((2**61 - 1) * (i + 2**12)).to_bytes(10, "little") + b"N" for i in range(100_000))
    + b"u.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x",
    "text that is not there": b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"x",
    "far place in the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long line": b"\x80\x02c" + b"x" * 9_999_999,
    "tensor of a huge shape": torch_zip(
        b"}" + text("w") + lazy(4, b"J\xff\xff\xff\x7f\x85", b"K\x00\x85") + b"s.", {"data/0": bytes(16)}
    ),
    "tensor of many dimensions": torch_zip(
        b"}" + text("w") + lazy(4, b"(" + b"K\x01" * 99_999 + b"t", b"(" + b"K\x01" * 99_999 + b"t") + b"s.",
        {"data/0": bytes(16)},
    ),
    "many conjugates of one storage": torch_zip(
        b"}("
        + b"".join(
            text(str(i)) + lazy(1 << 20, b"J\x00\x00\x10\x00\x85", b"K\x01\x85", b"}" + text("neg") + b"\x88s")
            for i in range(1000)
        )
        + b"u.",
        {"data/0": bytes(1 << 22)},
    ),
    "archive of zeros": torch_zip(b"}.", {"data/0": bytes(300 << 20)}, zipfile.ZIP_DEFLATED),
    "description of zeros": torch_zip(bytes(99 << 20), method=zipfile.ZIP_DEFLATED),
    "archive that claims much": claims("data/0", 0xFFFFFFF0),
    "description that claims much": claims("data.pkl", 0xFFFFFFF0),
    "header longer than the file": struct.pack("<Q", 99_999_999) + b"{}",
    "deep header": safetensors('{"a":' * 100_000),
    "deep metadata": safetensors(
        '{"__metadata__":{"config":"' + "[" * 100_000 + '"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "header of many digits": safetensors('{"w":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,4]}}'),
    "huge shape": safetensors(
        '{"w":{"dtype":"F32","shape":[4611686018427387903,4611686018427387903],"data_offsets":[0,4]}}', bytes(4)
    ),
    "many dimensions": safetensors(
        '{"w":{"dtype":"F32","shape":[' + "1," * 99_999 + '1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "negative places": safetensors('{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', bytes(4)),
    "name of dots": safetensors(
        '{"' + "module." * 50_000 + 'w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "web page": b"<html><title>{}</title>",
    "web page with a brace": b"<script>{",
    "large-file pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_files_made_to_fill_time_or_memory(tmp_path, kind):
    path = tmp_path / "x"
    path.write_bytes(BOMBS[kind])
    start = time.process_time()
    end = outcome(path)
    assert time.process_time() - start < SECONDS
    assert end != "read" or kind in ("many conjugates of one storage", "deep metadata", "name of dots")


# Files that were damaged at random


class Settings:
    """An object of somebody's own."""

    def __init__(self):
        self.rate, self.names = 0.1, ["a"]


def content() -> dict:
    half = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    state = OrderedDict(a=torch.arange(8.0), b=half.t(), tied=half, c=torch.nn.Parameter(torch.ones(2)))
    state["f8"] = torch.ones(3).to(torch.float8_e4m3fn)
    state["conj"] = torch.ones(2, dtype=torch.complex64).conj()
    beside = [Settings(), np.arange(3), np.float32(1), Path("x"), {1, (2, 3)}, slice(2), Counter("ab"), torch.Size([1])]
    return {"model": state, "model_ema": dict(state), "beside": beside, "epoch": 3, "name": "x", "none": None}


def saved(is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content(), buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


class Persistent:
    """Pickled as EDM pickles its networks."""

    def __init__(self, name: str, state: dict):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def pickled_network(protocol: int) -> bytes:
    """With every kind of value that its reader knows; its weights are of a nested torch.save each."""
    persistence = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    try:
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.SiLU(), torch.nn.BatchNorm1d(3))
        state = net.__dict__ | {"_init_args": [1, (2,)], "_init_kwargs": {"size": 8}, "extras": content()["beside"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pickle.dumps({"ema": Persistent("Net", state), "settings": content()["beside"]}, protocol)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def pickle_in(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with another description, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    return torch_zip(change(members.pop("data.pkl")), members)


def distributed_metadata(folder: Path) -> bytes:
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "epoch": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
    return (folder / ".metadata").read_bytes()


PIECES = [
    b"R",
    b"b",
    b"a",
    b"s",
    b"u",
    b"(",
    b"t",
    b"0",
    b"2",
    b"}",
    b"]",
    b")",
    b"\x81",
    b"\x92",
    b"\x93",
    b"\x94",
    b"Q",
    b"N",
    b"\x85",
    b"\x90",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cposix\nmkdir\n",
    b"X\x04\x00\x00\x00made\x85R",
    b"c__main__\nAny\n)R",
    b"ctorch\nload\n",
    b"h\x00",
    b"h\x01",
    b"h\x05",
    b"q\x01",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x0f",
    b"cnumpy\nndarray\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"\x80\x05",
    b"\x95" + b"\x01" * 8,
]


def mutated(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """`data` with one to three changes: bits, bytes, lengths, cuts, opcodes, pieces of itself and of other files."""
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        at, other = int(rng.integers(len(data) + 1)), others[int(rng.integers(len(others)))]
        end, start = min(len(data), at + int(rng.integers(1, 40))), int(rng.integers(len(other)))
        kind = rng.choice([0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.bytes(end - at) + data[end:]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] * int(rng.integers(2, 50)) + data[end:]
        elif kind == 4:
            data = data[:at] + other[start : start + int(rng.integers(1, 200))] + data[at:]
        elif kind == 5:
            data = data[:at] + struct.pack("<I", int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF]))) + data[at + 4 :]
        elif kind == 6 and rng.random() < 0.3:
            data = data[:at]
        else:
            data = data[:at] + PIECES[int(rng.integers(len(PIECES)))] + data[at:]
    return data


def mutated_opcodes(data: bytes, rng: np.random.Generator) -> bytes:
    """A pickle with whole opcodes left out, doubled, exchanged or put in, which the reader follows further."""
    starts = [position for _, _, position in pickletools.genops(data)]
    codes = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        i, j = (int(n) for n in rng.integers(len(codes) - 1, size=2))
        new = ([], [codes[i]] * 2, [codes[j]], [codes[i], PIECES[j % len(PIECES)]])[int(rng.integers(4))]
        codes[i : i + 1] = new
    return b"".join(codes)


def mutated_header(data: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file whose header is JSON still, with other values in it."""
    length = struct.unpack("<Q", data[:8])[0]
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    odd = [None, -1, 0, 1, 2**63, 1e400, "F32", "F4", [], {}, [[1]], [0, 4], [0, 1 << 62], True, "x" * 999]
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice(list(header)))
        if isinstance(header[name], dict) and header[name] and rng.random() < 0.8:
            header[name][str(rng.choice(list(header[name])))] = odd[int(rng.integers(len(odd)))]
        else:
            header[name] = odd[int(rng.integers(len(odd)))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def seeds(folder: Path) -> dict[str, list[bytes]]:
    plain = {name: value.detach().contiguous() for name, value in content()["model"].items() if name != "conj"}
    return {
        "pickle": [pickled_network(2), pickled_network(4)],
        "torch zip": [saved(True)],
        "description in a torch zip": [saved(True)],
        "torch legacy": [saved(False)],
        "safetensors": [save(plain, {"format": "pt", "config": '{"class": "Net", "kwargs": {}}'})],
        "distributed": [distributed_metadata(folder)],
    }


def damaged(kind: str, rng: np.random.Generator, seed: bytes, others: list[bytes]) -> bytes:
    if kind == "description in a torch zip":
        return pickle_in(seed, lambda pickled: damaged("pickle", rng, pickled, [pickled, *others]))
    if kind in ("pickle", "distributed") and rng.random() < 0.6:
        return mutated_opcodes(seed, rng)
    if kind == "safetensors" and rng.random() < 0.6:
        return mutated_header(seed, rng)
    return mutated(seed, others, rng)


def fuzz(folder: Path, kind: str, count: int, first: int) -> Counter:
    made = seeds(folder / "seeds")
    others, ends = [seed for files in made.values() for seed in files], Counter()
    path = folder / "seeds" if kind == "distributed" else folder / "file"
    file = path / ".metadata" if kind == "distributed" else path
    for seed in made[kind]:
        file.write_bytes(seed)
        assert outcome(path) == "read"
    for number in range(first, first + count):
        rng = np.random.default_rng([number, zlib.crc32(kind.encode())])
        file.write_bytes(damaged(kind, rng, made[kind][number % len(made[kind])], others))
        ends["read" if outcome(path) == "read" else "refused"] += 1
    return ends


KINDS = pytest.mark.parametrize(
    "kind", ["pickle", "torch zip", "description in a torch zip", "torch legacy", "safetensors", "distributed"]
)


@KINDS
def test_damaged_files_are_read_or_told(tmp_path, kind):
    """240 of them in all."""
    ends = fuzz(tmp_path, kind, 40, 0)
    assert ends["refused"] and ends.total() == 40


@pytest.mark.slow
@KINDS
def test_many_damaged_files_are_read_or_told(tmp_path, kind):
    """3,000 of them in all, which take minutes: rare ends are met by number only."""
    ends = fuzz(tmp_path, kind, 500, 1000)
    assert ends["refused"] and ends["read"]
