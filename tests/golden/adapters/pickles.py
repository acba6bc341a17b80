"""Pickled snapshots, for the adapters of the parts that have them."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from golden.case import Case, read_cases
from neon_files.checkpoint import Checkpoint, read_checkpoint
from neon_files.errors import UserError
from neon_files.pickles import PickledObject, read_pickle

Build = Callable[[Checkpoint], torch.nn.Module]  # a checkpoint -> its network, weights loaded, eval mode


def read_edm_pickle(case: Case, build: Build) -> dict[str, np.ndarray]:
    """Kind `pickle` of edm. `build` makes the network from the checkpoint's configuration and loads it."""
    path = case.folder / case.spec["pickle"]
    entries = read_pickle(path)
    check_edm_entries(case.config, entries)
    checkpoint = read_checkpoint(path)
    assert list(checkpoint.state) == case.config["state_dict_keys_in_order"]
    sums = [value.double().sum().item() for value in checkpoint.state.values()]
    norms = [value.double().square().sum().sqrt().item() for value in checkpoint.state.values()]
    labels = case.tensor("class_labels") if case.has("class_labels") else None
    with torch.no_grad():
        d = build(checkpoint)(case.tensor("x"), case.tensor("sigma"), labels)
    return {"d": d, "tensor_sums": np.array(sums), "tensor_norms": np.array(norms)}


def check_edm_entries(config: dict, entries: dict) -> None:
    """What the case says about the file's entries, apart from tensors."""
    assert list(entries) == config["top_level_keys"]
    ema = entries["ema"]
    assert ema.class_name == config["ema_class"]
    assert ema.init_args == config["ema_init_args"] and ema.init_kwargs == config["ema_init_kwargs"]
    assert ema.children["model"].init_kwargs == config["inner_init_kwargs"]
    for name in ("loss_fn", "augment_pipe", "dataset_kwargs"):
        if config.get(name) is None:
            assert entries.get(name) is None
        elif isinstance(entries[name], PickledObject):
            found = entries[name].attributes
            assert {key: found[key] for key in config[name]} == config[name]
        else:
            assert entries[name] == config[name]


def refuse_hostile(case: Case) -> dict[str, np.ndarray]:
    """Kind `pickle_hostile` of edm: 1 for every file that is refused without a trace of its being run.

    Afterwards every good pickle beside it is read again and must hold what it held before.
    """
    good = {path: _digest(path) for path in sorted(case.folder.glob("*.pkl"))}
    variable = case.config["marker_variable"]
    before = os.environ.get(variable)
    refused = []
    with tempfile.TemporaryDirectory() as folder:
        marker, file = Path(folder, "marker"), Path(folder, "file.pkl")
        os.environ[variable] = str(marker)
        try:
            for name in case.config["files"]:
                file.write_bytes(case.array(name).tobytes())
                refused.append(
                    all(_refuses(read, file) for read in (read_pickle, read_checkpoint)) and not marker.exists()
                )
        finally:
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before
    assert good == {path: _digest(path) for path in good}
    return {"refused": np.array(refused, dtype=np.int64)}


def _refuses(read: Callable, file: Path) -> bool:
    try:
        read(file)
    except UserError:
        return True
    return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name, value in read_pickle(path)["ema"].state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def read_imm_pickle(case: Case, build: Build) -> dict[str, np.ndarray]:
    """Kind `pickle` of imm. `build` makes the network from the checkpoint's configuration and loads it.

    A NaN in the file is set to 0 before the forward pass, as the case asks.
    """
    path = case.folder / case.spec["pickle"]
    checkpoint = read_checkpoint(path)
    found = {k: hashlib.sha256(v.float().numpy().tobytes()).hexdigest()[:16] for k, v in checkpoint.state.items()}
    assert list(found.items()) == list(case.spec["state_sha256_16"].items())
    kwargs = checkpoint.config["kwargs"]
    assert {key: kwargs.get(key, value) for key, value in case.config["net"].items()} == case.config["net"]
    for value in checkpoint.state.values():
        if value.is_floating_point():
            value.nan_to_num_(nan=0.0)
    with torch.no_grad():
        labels = case.tensor("labels") if case.has("labels") else None
        out = build(checkpoint)(case.tensor("x"), case.tensor("t"), case.tensor("s"), labels)
    return {"forward": out}


def hostile_case(root: Path) -> Case:
    """The case of hostile files among those under `root`."""
    return next(case for _, case in read_cases(root) if case.kind == "pickle_hostile")
