"""Every command of the README is understood by the real script, and says which file is missing."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]
SCRIPTS = [command for command in COMMANDS if ".py " in command]


def test_the_readme_has_the_commands_of_all_rows():
    assert sum("calculate_fid.py" in command and "torchrun" in command for command in COMMANDS) == 8


@pytest.mark.parametrize("command", SCRIPTS, ids=[re.search(r"\S+\.py.{0,60}", c)[0] for c in SCRIPTS])
def test_the_script_takes_the_command_and_names_what_is_missing(command, tmp_path, monkeypatch, capsys):
    """In an empty folder and offline, the first check that fails is a missing file: exit code 2 and its name, before
    any model is built. An unknown flag or a bad value would be another message."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[at]), *words[at + 1 :]])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    told = capsys.readouterr()
    assert stop.value.code == 2, told.err
    assert "Usage:" not in told.err and "No such option" not in told.err, told.err
    named = [
        word for word in words[at + 1 :] if re.search(r"\.(pkl|pth|npz|ckpt|safetensors)$|^datasets/|^runs/", word)
    ]
    named += ["edm-cifar10-32x32-cond-vp.pkl"] * ("--preset" in words)
    assert any(Path(word).name in told.err for word in named), told.err


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets and all(re.search(rf"^{t}:", makefile, flags=re.M) for t in targets)


def test_links_of_the_documents_lead_somewhere():
    documents = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in documents or ["README.md"]:
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#\s]+)\)|\]\(([^)#\s]+)#", text):
            target = next(part for part in target if part)
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_the_api_example_runs():
    """The README's ten lines, on a network of one layer."""
    import torch

    code = re.search(r"```python\n(.*?)```", README, flags=re.S)[1]
    model = torch.nn.Linear(2, 2)
    theta_base = {k: v.clone() for k, v in model.state_dict().items()}
    theta_syn = {k: v + 1 for k, v in theta_base.items()}
    names = {"model": model, "theta_base": theta_base, "theta_syn": theta_syn, "score": lambda m: m.bias.sum().item()}
    exec(code, names)
    torch.testing.assert_close(names["theta_neon"]["bias"], theta_base["bias"] - 1)
    torch.testing.assert_close(model.bias.detach(), theta_base["bias"] - 1.5)
