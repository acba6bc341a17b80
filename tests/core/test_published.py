"""Published files as the scripts ask for them: where they are kept, what is named when they are missing, the list."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from download_place import ROOT, A
from pyproject import PYPROJECT

from neon_files import home as home_module
from neon_files.downloads import fetch
from neon_files.errors import UserError
from neon_files.home import home
from neon_files.manifest import MANIFEST, find_file, read_manifest
from neon_files.published import find_all
from neon_run.backbones import find_rows

# For the scripts


def test_url_is_fetched_once_into_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    url = f"{server.url}/files/a.pth?download=1"
    server.files["a.pth?download=1"] = A
    path = fetch(url)
    assert path.read_bytes() == A and path.name.endswith("_a.pth") and path.is_relative_to(tmp_path / "cache")
    assert fetch(url) == path and len(server.gets()) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(url) == path
    with pytest.raises(UserError, match=r"missing; HF_HUB_OFFLINE is set; put the file at .*_c\.npz yourself"):
        fetch(f"{server.url}/c.npz")
    assert len(server.gets()) == 1


def test_published_url_is_found_where_the_script_puts_it(server, tmp_path, monkeypatch):
    entry = next(entry for entry in MANIFEST.entries if entry.name == "cifar10-32x32.npz")
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"run `bash download_models\.sh cifar10-32x32\.npz`"):
        fetch(entry.url)
    (tmp_path / "fid_stats").mkdir()
    (tmp_path / entry.destination).write_bytes(b"x")
    assert fetch(entry.url) == tmp_path / entry.destination


def test_path_is_only_looked_for(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"x")
    assert fetch(tmp_path / "x.npz") == tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"kl16\.ckpt: does not exist; `bash download_models\.sh kl16\.ckpt` puts"):
        fetch(tmp_path / "kl16.ckpt")
    with pytest.raises(UserError, match=r"`bash download_models\.sh xarl` puts Neon_xARL_imagenet256\.pth into .*/ch"):
        find_file("checkpoints/Neon_xARL_imagenet256.pth")


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A working directory and a root without any published file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEON_HOME", str(tmp_path / "root"))
    monkeypatch.setenv("NEON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_all_files_that_a_command_lacks_are_named_in_one_line_with_one_command(empty_home):
    wanted = {
        "--var_ckpt": "checkpoints/Neon_VARd16_imagenet256.pth",
        "--vae_ckpt": Path("elsewhere/vae_ch160v4096z32.pth"),
        "--fid_stats": "fid_stats/adm_in256_stats.npz",
        "--detector": None,
    }
    with pytest.raises(UserError) as caught:
        find_all(wanted)
    assert caught.value.message == (
        "not here: --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth, --vae_ckpt elsewhere/vae_ch160v4096z32.pth, "
        "--fid_stats fid_stats/adm_in256_stats.npz; `bash download_models.sh vard16` fetches them"
    )
    (empty_home / "fid_stats").mkdir()
    (empty_home / "fid_stats" / "adm_in256_stats.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^not here: --vae_path kl16\.ckpt; `bash .*sh kl16\.ckpt` fetches it$"):
        find_all({"--fid_stats": wanted["--fid_stats"], "--vae_path": "kl16.ckpt"})
    assert find_all({"--fid_stats": wanted["--fid_stats"], "--detector": None}) == {
        "--fid_stats": Path("fid_stats/adm_in256_stats.npz")
    }


def test_files_that_nobody_publishes_and_folders_are_named_beside_the_command(empty_home):
    (empty_home / "folder").mkdir()
    wanted = {"--base": "mine.pth", "--fid_stats": "folder", "--reference": "fid_stats/cifar10-32x32.npz"}
    with pytest.raises(UserError) as caught:
        find_all(wanted | {"--heldout": "fid_stats/ffhq-64x64.npz"})
    assert caught.value.message == (
        "not here: --reference fid_stats/cifar10-32x32.npz, --heldout fid_stats/ffhq-64x64.npz; "
        "`bash download_models.sh cifar10-32x32.npz ffhq-64x64.npz` fetches them; "
        "--base mine.pth: does not exist; nobody publishes a file of this name (`bash download_models.sh --list`), "
        "so name another one; --fid_stats folder: is a folder; name a file in it"
    )


def test_urls_are_named_with_the_paths_or_fetched(server, empty_home, monkeypatch):
    urls = {e.name: e.url for e in MANIFEST.entries}
    base, reference = urls["edm-ffhq-64x64-uncond-vp.pkl"], urls["ffhq-64x64.npz"]
    with pytest.raises(UserError) as caught:
        find_all({"--network": base, "--syn": "Neon_EDM_FFHQ.pkl", "--ref": reference, "--other": server.url + "/x"})
    assert caught.value.message == (
        f"not here: --network {base} (not fetched yet), --syn Neon_EDM_FFHQ.pkl, --ref {reference} (not fetched yet); "
        "`bash download_models.sh edm-ffhq` fetches them"
    )
    with pytest.raises(UserError, match=r"\(not fetched yet\), --ref .* fetches them; --other .* yourself$"):
        find_all({"--other": server.url + "/x", "--network": base, "--ref": reference})
    assert server.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_all({"--other": f"{server.url}/files/a.pth"})["--other"].read_bytes() == A


# Where files go


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As from a wheel: the code lies in a folder without download_models.sh."""
    monkeypatch.setattr(home_module, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("NEON_HOME", raising=False)
    monkeypatch.delenv("NEON_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_a_checkout_stay_in_it_unless_neon_home_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("NEON_HOME", raising=False)
    assert home() == ROOT and home_module.download_command("xarl") == "bash download_models.sh xarl"
    monkeypatch.setenv("NEON_HOME", str(tmp_path))
    assert home() == tmp_path


def test_an_installed_package_keeps_files_in_the_users_cache(installed, monkeypatch):
    assert home() == installed / "cache" / "neon" and home_module.cache_dir() == home()
    with pytest.raises(UserError, match=r"`neon download xarl` puts Neon_xARL_.*pth into .*neon/checkpoints$"):
        find_file("checkpoints/Neon_xARL_imagenet256.pth")
    with pytest.raises(UserError, match=r"`neon download xarl` fetches it$"):
        find_all({"--base": "checkpoints/xAR-L.pth"})
    monkeypatch.setenv("NEON_HOME", "~/models")
    assert home() == Path.home() / "models"


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", None, ".cache/neon"),
        ("darwin", None, "Library/Caches/neon"),
        ("win32", None, "AppData/Local/neon"),
        ("win32", "LOCALAPPDATA", "neon"),
    ],
)
def test_cache_folder_of_the_platform(installed, monkeypatch, platform, variable, folder):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(installed))
    if variable:
        monkeypatch.setenv(variable, str(installed))
    assert home() == installed / folder


def test_the_place_of_a_published_file_is_also_sought_in_the_home(installed, capsys):
    there = home() / "fid_stats" / "adm_in256_stats.npz"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x")
    assert find_file("fid_stats/adm_in256_stats.npz") == there and find_file("ADM_in256_stats.npz") == there
    assert f"fid_stats/adm_in256_stats.npz: not there; using {there}" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):  # another folder means another file
        find_file("mine/adm_in256_stats.npz")
    here = installed / "fid_stats" / "adm_in256_stats.npz"
    here.parent.mkdir()
    here.write_bytes(b"y")
    assert find_file("fid_stats/adm_in256_stats.npz") == Path("fid_stats/adm_in256_stats.npz")


def test_a_cache_that_cannot_be_written_is_one_sentence(installed, server):
    (installed / "cache").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        fetch(f"{server.url}/files/a.pth")
    sentence = f"{installed}/cache/neon/downloads: cannot write there (Not a directory); mend that, or set NEON_HOME to"
    assert caught.value.message.startswith(sentence) and server.requests == []


def test_download_command_of_an_installed_package_fills_the_home(tmp_path):
    shutil.copytree(ROOT / "neon_files", tmp_path / "site" / "neon_files", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "NEON_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "neon_files.downloads", "--list", "imm"]
    there = tmp_path / "home" / "checkpoints" / "cifar10.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x")
    result = subprocess.run(
        [*command, "cifar10.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "here       ? bytes  checkpoints/cifar10.pt" in result.stdout, result.stderr
    assert result.stdout.count("<- hub") == 6


# The list itself


def test_list_is_consistent():
    names = [entry.name for entry in MANIFEST.entries]
    assert len(set(names)) == len(names) and len(MANIFEST.default) == 10
    spelled = [name.lower() for e in MANIFEST.entries for name in (e.name, *e.aliases)]
    assert len(set(spelled)) == len(spelled)
    for entry in MANIFEST.entries:
        assert bool(entry.repo) != bool(entry.url) and entry.licence
        assert len(entry.sha256) in (0, 64) and not Path(entry.folder).is_absolute()
    for row in MANIFEST.rows:
        chosen = {entry.name for entry in MANIFEST.select((row,))}
        assert chosen == set(MANIFEST.rows[row]) and any(name.startswith("weights-inception") for name in chosen)
    in_rows = {name for names in MANIFEST.rows.values() for name in names}
    assert set(MANIFEST.default) <= in_rows
    assert all(e.restricted for e in MANIFEST.entries if "edm" in (e.name + e.url).lower() or "lumaai" in e.repo)
    assert MANIFEST.entry("checkpoints/Neon_IMM_imagenet256.pth").name == "Neon_imm_imagenet256.pkl"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"entries": [{"name": "a", "folder": "b"}]}', "a: either a repo or a url"),
        ('{"entries": [{"name": "a", "folder": "b", "url": "u", "colour": 1}]}', "colour"),
        ('{"entries": [], "rows": {"r": ["a"]}}', "a under rows or default, but not under entries"),
    ],
)
def test_a_list_of_ones_own_is_checked(tmp_path, content, reason):
    (tmp_path / "own.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.json: not a list of published files") as caught:
        read_manifest(tmp_path / "own.json")
    assert reason in caught.value.message


def test_every_row_names_files_that_can_be_fetched():
    known = {entry.destination for entry in MANIFEST.entries} | {entry.url for entry in MANIFEST.entries}
    for row in find_rows().values():
        for place in (row.base, row.fid_stats):
            assert not place or place in known, f"{row.id}: {place}"


def test_shell_script_passes_on_words_and_exit_code(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "download_models.sh"), "--root", "here", "inception"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "1 of 1 files are not here" in result.stderr
    environment["PYTHON"] = "/nonexistent/python"
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "pip install -e ." in result.stderr


def test_the_list_is_in_the_wheel():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    assert "manifest.json" in data["neon_files"] and (ROOT / "neon_files" / "manifest.json").is_file()


def test_documentation_lists_every_file_and_row():
    text = (ROOT / "docs" / "downloads.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*MANIFEST.rows, *(entry.name for entry in MANIFEST.entries)))
    assert all(f"`{entry.folder}/`" in text and entry.repo in text for entry in MANIFEST.entries)
