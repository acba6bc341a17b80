"""One golden case: its settings and input arrays, and the rule by which outputs are compared."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Case:
    """One entry of a `cases.json`. `spec` is the entry as it stands, `folder` the place of its files."""

    spec: dict
    folder: Path

    @property
    def name(self) -> str:
        return self.spec["case"]

    @property
    def kind(self) -> str:
        return self.spec["kind"]

    @property
    def config(self) -> dict:
        return self.spec["config"]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / self.spec["file"], allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files}

    def array(self, name: str) -> np.ndarray:
        """The input array `in_<name>`."""
        return self.arrays["in_" + name]

    def tensor(self, name: str) -> torch.Tensor:
        """The input array `in_<name>` as a tensor of the same dtype."""
        return torch.from_numpy(np.array(self.array(name)))

    def has(self, name: str) -> bool:
        return "in_" + name in self.arrays

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """The arrays `out_<name>`, by `<name>`."""
        return {name[4:]: value for name, value in self.arrays.items() if name.startswith("out_")}

    def tolerance(self, output: str) -> tuple[float, float]:
        """(rtol, atol) of one output; integers are exact unless the case names the output."""
        for pattern, limits in self.spec.get("tolerance_by_output", {}).items():
            if fnmatch(output, pattern.removeprefix("out_")):
                return limits["rtol"], limits["atol"]
        return self.spec["tolerance"]["rtol"], self.spec["tolerance"]["atol"]


def read_cases(root: Path) -> list[tuple[str, Case]]:
    """(part, case) of every `<root>/<part>/cases.json`, in the order of the files."""
    found = []
    for listing in sorted(root.glob("*/cases.json")):
        found += [
            (listing.parent.name, Case(spec, listing.parent))
            for spec in json.loads(listing.read_text(encoding="utf-8"))
        ]
    return found


def mismatch(case: Case, output: str, ours: np.ndarray) -> str | None:
    """None where `ours` agrees with the golden array `out_<output>`, else one line that says how far off it is.

    |ours - golden| <= atol + rtol |golden| element by element; NaN equals NaN, infinities must agree in sign, shapes
    must be equal; integers and bools are exact where neither side is a float.
    """
    golden = case.expected[output]
    ours = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    if ours.shape != golden.shape:
        return f"{output}: shape {ours.shape}, golden {golden.shape}"
    rtol, atol = case.tolerance(output)
    integers = ours.dtype.kind in "biu" and golden.dtype.kind in "biu"
    if golden.dtype.kind in "US" or (integers and output not in case.spec.get("tolerance_by_output", {})):
        wrong = np.count_nonzero(ours != golden)
        return f"{output}: {wrong} of {golden.size} entries differ" if wrong else None
    a, b = ours.astype(np.float64), golden.astype(np.float64)
    both_finite = np.isfinite(a) & np.isfinite(b)
    same_odd = (np.isnan(a) & np.isnan(b)) | (a == b)
    with np.errstate(invalid="ignore"):
        error = np.where(both_finite, np.abs(a - b), np.where(same_odd, 0.0, np.inf))
        limit = atol + rtol * np.where(both_finite, np.abs(b), 0.0)
    if np.all(error <= limit):
        return None
    return f"{output}: max error {error.max():.3g}, {np.count_nonzero(error > limit)} of {error.size} above tolerance"
