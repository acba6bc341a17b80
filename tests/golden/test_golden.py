"""Every golden case through one adapter per kind, and every published key list against our full-size networks.

pytest tests/golden                           # the cases that ship with the project
pytest tests/golden --golden-root DIR         # any other folder of <part>/cases.json
"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.case import Case, mismatch, read_cases

DRAWN = "a CPU draws other exponentials and dropout masks from this seed"
BEFORE_TORCH_2_6 = {  # where these cases have other numbers
    **dict.fromkeys(("edm-unet_train_mode", "edm-adm_train_mode"), DRAWN),
    **dict.fromkeys(("imm-dit_dropout", "imm-loss_songunet_dropout"), DRAWN),
    **dict.fromkeys(("var-var_seeded_sampling", "var-var_more_smooth", "var-sample_with_top_k_top_p"), DRAWN),
    "xar-dropout": DRAWN,
    "edm-precond_tables": "iDDPM's float32 table is rounded otherwise, by 8e-6 at most",
}


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("--golden-root"))
    if "case" in metafunc.fixturenames:
        cases = read_cases(root)
        assert cases, f"--golden-root {root}: no <part>/cases.json found"
        metafunc.parametrize(("part", "case"), cases, ids=[f"{part}-{case.name}" for part, case in cases])
    if "key_list" in metafunc.fixturenames:
        lists = sorted(root.glob("*/keys_*.json"))
        metafunc.parametrize("key_list", lists, ids=[f"{path.parent.name}-{path.stem}" for path in lists])


def adapter_module(part: str):
    return importlib.import_module(f"golden.adapters.{part}")


def test_case(part: str, case: Case):
    if torch.__version__ < "2.6" and (reason := BEFORE_TORCH_2_6.get(f"{part}-{case.name}")):
        pytest.skip(f"torch {torch.__version__}, before 2.6: {reason}")
    module = adapter_module(part)
    assert case.kind in module.ADAPTERS, f"no adapter for kind {case.kind!r} of {part}"
    ours = module.ADAPTERS[case.kind](case)
    compare = getattr(module, "COMPARE", {}).get(case.kind, mismatch)
    missing = sorted(set(case.expected) - set(ours))
    problems = [f"not computed: {missing}"] if missing else []
    problems += [text for name in case.expected if name in ours and (text := compare(case, name, ours[name]))]
    assert not problems, f"{part}/{case.name} ({case.spec['what']}): " + "; ".join(problems)
    assert len(case.expected) or case.spec.get("outputs") == {}, "a case without outputs checks nothing"


def test_key_list(key_list: Path):
    spec = json.loads(key_list.read_text(encoding="utf-8"))
    expected = {name: tuple(shape) for name, shape in (spec.get("keys") or spec["state_dict"]).items()}
    ours = adapter_module(key_list.parent.name).KEY_LISTS(key_list.name, spec)
    assert list(ours) == list(expected), "names or their order differ"
    assert {k: tuple(v) for k, v in ours.items()} == expected
    assert np.all([all(side >= 0 for side in shape) for shape in expected.values()])
