"""Every command of the README, and of the page for users of the official repository, is understood by the real script,
and says which file is missing."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from neon_files.errors import UserError
from neon_run.backbones import find_backbones
from neon_run.commands import STAGES, command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SCRIPTS = [command for command in COMMANDS if ".py " in command]


def test_the_readme_has_the_commands_of_all_rows():
    assert sum("calculate_fid.py" in command and "torchrun" in command for command in COMMANDS) == 8


@pytest.fixture
def run_offline(tmp_path, monkeypatch, capsys, offline):
    """stderr of a script with these words, in an empty folder and offline. The first check that fails is then a missing
    file: exit code 2, before any model is built."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(script, words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
        errors = capsys.readouterr().err
        assert stop.value.code == 2, errors
        return errors

    return run


def script_of(command):
    """(the script, the words behind it)"""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("command", SCRIPTS, ids=[re.search(r"\S+\.py.{0,60}", c)[0] for c in SCRIPTS])
def test_the_script_takes_the_command_and_names_what_is_missing(command, run_offline):
    """An unknown flag or a bad value would be another message."""
    script, words = script_of(command)
    errors = run_offline(script, words)
    assert "Usage:" not in errors and "No such option" not in errors, errors
    named = [word for word in words if re.search(r"\.(pkl|pth|npz|ckpt|safetensors)$|^datasets/|^runs/", word)]
    named += ["edm-cifar10-32x32-cond-vp.pkl"] * ("--preset" in words)
    assert any(Path(word).name in errors for word in named), errors


# The page for users of the official repository: tables of two columns, the official command and ours

PAGE = (ROOT / "docs" / "from_the_official_repository.md").read_text(encoding="utf-8")
PAIRS = [
    (official, ours)
    for official, ours in re.findall(r"^\| (.+) \| `((?:VAR|xAR|edm|imm)/\S+\.py .+)` \|$", PAGE, flags=re.M)
]
OFFICIAL = [(official.strip("`"), script_of(ours)[0]) for official, ours in PAIRS if official.startswith("`")]


def test_the_page_has_every_stage_of_every_backbone():
    scripts = {script_of(ours)[0] for _, ours in PAIRS}
    stages = {(script.split("/")[0], script.split("/")[-1]) for script in scripts}
    wanted = {(b, f"{s}.py") for b in ("VAR", "xAR", "edm", "imm") for s in ("generate", "finetune", "sweep")}
    assert wanted | {(b, "calculate_fid.py") for b in ("VAR", "xAR", "edm", "imm")} <= stages and len(PAIRS) > 20


@pytest.mark.parametrize("ours", [ours for _, ours in PAIRS], ids=[ours[:70] for _, ours in PAIRS])
def test_our_command_of_the_page_is_understood(ours, run_offline):
    errors = run_offline(*script_of(ours))
    assert "Error: " in errors and "Usage:" not in errors and "No such option" not in errors, errors
    assert not any(f"Error: {name}" in errors for name in REFUSED), errors


@pytest.mark.parametrize(("official", "script"), OFFICIAL, ids=[official[:70] for official, _ in OFFICIAL])
def test_the_official_words_are_used_or_refused_with_our_flag(official, script, run_offline):
    """Given to the script that does the same here."""
    errors = run_offline(script, script_of(official)[1])
    assert "No such option" not in errors and "unexpected extra argument" not in errors, errors


REFUSED = {name: advice for commands in find_backbones() for name, advice in commands.refused.items()}


@pytest.mark.parametrize("commands", find_backbones(), ids=lambda commands: commands.name)
def test_a_refused_flag_names_one_that_exists_and_is_on_the_page(commands, capsys):
    made = [command(stage, commands) for stage in STAGES]
    known = {name for one in made for option in one.params for name in option.opts}
    for name, advice in commands.refused.items():
        refusing = [
            one for one in made if f"refused_{name.strip('-').replace('-', '_')}" in {p.name for p in one.params}
        ]
        assert refusing, name
        for words in ([name], [name, "1"], [f"{name}=1"]):
            with pytest.raises(UserError, match=f"^{name}: "):
                refusing[0].main(words, standalone_mode=False)
        assert set(re.findall(r"--\w+", advice)) <= known and ("--" in advice or "leave it out" in advice), advice
        assert f"`{name}`" in PAGE, name
    for option in commands.ignored:
        assert f"`{option.opts[0]}`" in PAGE, option.opts[0]


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets and all(re.search(rf"^{t}:", makefile, flags=re.M) for t in targets)


def test_links_of_the_documents_lead_somewhere():
    documents = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in documents or ["README.md"]:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)\)|\]\(([^)#\s]+)#", text):
            target = next(part for part in target if part)
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_links_within_the_readme_lead_to_a_heading():
    """As the hub and GitHub name them: small letters, blanks as hyphens, no other signs."""
    headings = re.findall(r"^#+ (.+)$", README, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(targets) > 8 and set(targets) <= anchors, set(targets) - anchors


def test_the_table_links_every_weight_of_the_manifest():
    listed = json.loads((ROOT / "neon_files/manifest.json").read_text(encoding="utf-8"))["entries"]
    entries = {entry["name"]: entry["repo"] for entry in listed if entry["name"].startswith("Neon_")}
    linked = dict(re.findall(r"\[`(Neon_\S+)`\]\(https://huggingface.co/(\S+)/blob/main/\1\)", README))
    assert linked == entries and len(linked) == 8


def test_files_that_the_documents_name_exist():
    """`neon_core/merge.py` and the like; packages of backbones lie in their folders."""
    places = [ROOT, *(ROOT / folder for folder in ("VAR", "xAR", "edm", "imm"))]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    written = re.compile(r"`((?:neon_\w+|tests|benchmarks|docs|VAR|xAR|edm|imm)/[\w/]+\.(?:py|md))`")
    named = [(page.name, path) for page in pages for path in written.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 60
    missing = [(page, path) for page, path in named if not any((place / path).exists() for place in places)]
    assert not missing


def test_the_api_example_runs():
    """The README's ten lines, on a network of one layer."""
    import torch

    code = re.search(r"```python\n(import torch\nfrom neon_core .*?)```", README, flags=re.S)[1]
    model = torch.nn.Linear(2, 2)
    theta_base = {k: v.clone() for k, v in model.state_dict().items()}
    theta_syn = {k: v + 1 for k, v in theta_base.items()}
    names = {"model": model, "theta_base": theta_base, "theta_syn": theta_syn, "score": lambda m: m.bias.sum().item()}
    exec(code, names)
    torch.testing.assert_close(names["theta_neon"]["bias"], theta_base["bias"] - 1)
    torch.testing.assert_close(model.bias.detach(), theta_base["bias"] - 1.5)
