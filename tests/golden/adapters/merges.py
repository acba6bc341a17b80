"""The merges of the four parts, for their adapters."""

import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch

from golden.case import Case
from neon_core.merge import neon_merge
from neon_files.checkpoint import read_checkpoint
from neon_run.check.numbers import fill
from neon_run.merging.rules import find_rule


def _states(case: Case, separator: str) -> tuple[dict, dict]:
    """The arrays in_base<separator>NAME and in_aux<separator>NAME as two state dicts."""
    names = [name.removeprefix("in_") for name in case.arrays if name.startswith("in_")]
    sides = ("base" + separator, "aux" + separator)
    return tuple({n.removeprefix(side): case.tensor(n) for n in names if n.startswith(side)} for side in sides)


def merge_var(case: Case) -> dict[str, torch.Tensor]:
    """Kind `neon_merge` of var; nested dictionaries in a file give the same."""
    base, aux = _states(case, "__")
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        nestings = ((base, aux), ({"trainer": {"var_wo_ddp": base}}, {"var_wo_ddp": aux}))
        for number, pair in enumerate(nestings):
            read = []
            for side, content in zip(("base", "aux"), pair, strict=True):
                path = Path(folder, f"{side}{number}.pth")
                torch.save(content, path)
                read.append(read_checkpoint(path).state)
            for w in case.config["w"]:
                merged = neon_merge(*read, w, rule=find_rule("official-var"))
                for name, value in merged.items():
                    key = f"w{w}__{name}"
                    assert key not in out or torch.equal(out[key].nan_to_num(), value.nan_to_num())
                    out[key] = value
    return out


def merge_imm(case: Case) -> dict[str, torch.Tensor]:
    """Kind `merge` of imm."""
    base, aux = _states(case, "_")
    merged = {w: neon_merge(base, aux, w, rule=find_rule("official-imm")) for w in case.config["w"]}
    return {f"w{w}/{name}": value for w, state in merged.items() for name, value in state.items()}


def merge_edm(case: Case, build: Callable[[dict], torch.nn.Module]) -> dict[str, np.ndarray]:
    """Kind `merge` of edm. `build` makes the preconditioner from `config.net`."""
    base = fill(build(case.config["net"])).state_dict()
    names = case.config["keys_in_order"]
    assert list(base) == names
    delta = case.tensor("delta")
    aux = {name: base[name] + 0.01 * delta[i % len(delta)] for i, name in enumerate(names)}
    out = {}
    for j, w in enumerate(case.config["w"]):
        merged = neon_merge(base, aux, w, rule=find_rule("official-edm"))
        out[f"sums_{j}"] = np.array([merged[name].double().sum().item() for name in names])
        out[f"norms_{j}"] = np.array([merged[name].double().square().sum().sqrt().item() for name in names])
        out[f"first_tensor_{j}"] = merged[names[0]]
    return out


def merge_xar(case: Case) -> dict[str, torch.Tensor]:
    """Kind `merge` of xar: every container form for the base with every form for the synthetic side."""
    names, config = case.config["keys"], case.config

    def read(side: str, nesting: str, prefix: str, folder: str) -> dict[str, torch.Tensor]:
        state = {prefix + name: case.tensor(f"{side}_{n}") for n, name in enumerate(names)}
        path = Path(folder, "file.pth")
        torch.save(state if nesting == "flat" else {nesting: state, "epoch": 3}, path)
        return {name: value.clone() for name, value in read_checkpoint(path).state.items()}

    with tempfile.TemporaryDirectory() as folder:
        sides = [[read(side, *form, folder) for form in config["containers"]] for side in ("base", "syn")]
    merged = [neon_merge(base, syn, config["w"], keep=config["buffers"]) for base, syn in product(*sides)]
    assert all(list(m) == names and all(torch.equal(m[n], merged[0][n]) for n in names) for m in merged)
    return {f"merged_{n}": merged[0][name] for n, name in enumerate(names)}
