"""Every golden case through one adapter per kind, and every published key list against our full-size networks.

pytest tests/golden                           # the cases that ship with the project
pytest tests/golden --golden-root DIR         # any other folder of <part>/cases.json
"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from needs import DRAWS

from golden.case import Case, mismatch, read_cases

DRAWN = {"edm-unet_train_mode", "edm-adm_train_mode", "imm-dit_dropout", "imm-loss_songunet_dropout", "xar-dropout",
         "var-var_seeded_sampling", "var-var_more_smooth", "var-sample_with_top_k_top_p"}  # fmt: skip


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("--golden-root"))
    if "case" in metafunc.fixturenames:
        cases = read_cases(root)
        assert cases, f"--golden-root {root}: no <part>/cases.json found"
        named = {f"{part}-{case.name}": (part, case) for part, case in cases}
        values = [pytest.param(*pair, id=name, marks=DRAWS if name in DRAWN else ()) for name, pair in named.items()]
        metafunc.parametrize(("part", "case"), values)
    if "key_list" in metafunc.fixturenames:
        lists = sorted(root.glob("*/keys_*.json"))
        metafunc.parametrize("key_list", lists, ids=[f"{path.parent.name}-{path.stem}" for path in lists])


def adapter_module(part: str):
    return importlib.import_module(f"golden.adapters.{part}")


def test_case(part: str, case: Case):
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
