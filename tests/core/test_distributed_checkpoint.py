"""Folders of torch.distributed.checkpoint are put together from their parts; nothing in `.metadata` is executed."""

import io
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from neon_files.checkpoint import open_checkpoint, read_checkpoint
from neon_files.errors import UserError
from neon_run.merging.command import merge_command

STATE = {"block.weight": torch.arange(24.0).reshape(4, 6), "bias": torch.ones(3, dtype=torch.bfloat16)}


def save(folder, content) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is only one process
        dcp.save(content, checkpoint_id=folder)


def parts(folder, boxes, size=(4, 6), change=None) -> None:
    """A checkpoint as two ranks write it: the boxes (start, size) of `weight`, each in a file of its own."""
    folder.mkdir()
    whole, chunks, places = STATE["block.weight"], [], {}
    for rank, (start, shape) in enumerate(boxes):
        part = whole[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]].clone()
        buffer = io.BytesIO(b"before")
        buffer.seek(6)
        single = io.BytesIO()
        torch.save(part, single)
        buffer.write(single.getvalue())
        (folder / f"__{rank}_0.distcp").write_bytes(buffer.getvalue())
        chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
        place = MetadataIndex("weight", torch.Size(start))
        places[place] = _StorageInfo(f"__{rank}_0.distcp", 6, len(single.getvalue()))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)
    metadata = Metadata({"weight": entry, "epoch": BytesStorageMetadata()}, None, places)
    if change:
        change(metadata, places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_torch_saved_is_read(tmp_path):
    save(tmp_path / "flat", STATE)
    checkpoint = read_checkpoint(tmp_path / "flat")
    assert checkpoint.container == "distributed"
    assert {k: v.tolist() for k, v in checkpoint.state.items()} == {k: v.tolist() for k, v in STATE.items()}
    assert all(checkpoint.state[name].dtype == value.dtype for name, value in STATE.items())


def test_entries_are_chosen_as_in_any_file(tmp_path, capsys):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    save(tmp_path / "x", {"model": {k: v + 1 for k, v in STATE.items()}, "model_ema": STATE, "optimizer": optimizer})
    assert torch.equal(read_checkpoint(tmp_path / "x").state["block.weight"], STATE["block.weight"])
    assert "takes the averaged weights 'model_ema', not 'model'" in capsys.readouterr().err
    assert torch.equal(read_checkpoint(tmp_path / "x", "model").state["bias"], STATE["bias"] + 1)


HALVES = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
QUARTERS = [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 4), (2, 2))]


@pytest.mark.parametrize("boxes", [HALVES, QUARTERS])
def test_parts_of_several_ranks_are_joined(tmp_path, boxes):
    parts(tmp_path / "x", boxes)
    weights = open_checkpoint(tmp_path / "x")
    assert weights.layout() == {"weight": (torch.float32, (4, 6))}
    assert torch.equal(weights.loaders["weight"](), STATE["block.weight"])


WRONG = {
    "do not fill its shape": {"boxes": HALVES[:1]},
    "lies outside of it": {"boxes": HALVES, "size": (3, 6)},
    "its parts overlap": {"boxes": [HALVES[0], ((1, 0), (2, 6))]},
    "is missing or lies": {"boxes": HALVES, "change": lambda m, places: places.pop(next(iter(places)))},
    "part outside of the folder": {
        "boxes": HALVES,
        "change": lambda m, p: p.update({k: _StorageInfo("../x", 0, 9) for k in p}),
    },
    "is cut short": {
        "boxes": HALVES,
        "change": lambda m, p: p.update({k: _StorageInfo("__0_0.distcp", 0, 1 << 40) for k in p}),
    },
    "part a.distcp is missing": {
        "boxes": HALVES,
        "change": lambda m, p: p.update({k: _StorageInfo("a.distcp", 0, 1) for k in p}),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_damaged_folders_are_told(tmp_path, message):
    parts(tmp_path / "x", **WRONG[message])
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(tmp_path / "x")
    assert caught.value.message.startswith(str(tmp_path / "x"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_metadata_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x", STATE)
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"refused, nothing in it was run: the pickle names posix\.mkdir"):
        read_checkpoint(tmp_path / "x")
    assert not (tmp_path / "made").exists()


def test_a_part_alone_is_refused(tmp_path):
    save(tmp_path / "x", STATE)
    with pytest.raises(UserError, match="is a part of a distributed checkpoint; name its folder"):
        read_checkpoint(tmp_path / "x" / "__0_0.distcp")


def test_two_folders_are_merged_into_one_file(tmp_path):
    save(tmp_path / "base", {"model": STATE})
    save(tmp_path / "syn", {"model": {f"module.{name}": value + 1 for name, value in STATE.items()}})
    paths = [str(tmp_path / name) for name in ("base", "syn", "out.safetensors")]
    result = CliRunner().invoke(merge_command, [*paths[:2], "-w", "0.5", "-o", paths[2]])
    assert result.exit_code == 0, result.output
    merged = read_checkpoint(paths[2])
    assert torch.equal(merged.state["block.weight"], STATE["block.weight"] - 0.5)
    assert len(merged.metadata["neon"]["base"]["sha256"]) == 64
