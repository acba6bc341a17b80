"""`neon push`: the card tells what the records say, and the hub gets all of it or nothing."""

import json

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from loopback_hub import Loopback
from safetensors.torch import save_file

from neon_files.atomic import sha256_file
from neon_files.checkpoint import write_checkpoint
from neon_run.merging.files import merge_files
from neon_run.merging.push import MARK, push_command
from neon_run.merging.steps import Steps


@pytest.fixture
def hub(monkeypatch):
    with Loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)  # plain LFS
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def merged(tmp_path, base: str = "mine.safetensors", w: float = 1.5):
    for name, value in ((base, 1.0), ("syn.safetensors", 1.5)):
        write_checkpoint(tmp_path / name, {"a": torch.full((3,), value)}, metadata={"recipe": "tiny"})
    return merge_files(tmp_path / base, tmp_path / "syn.safetensors", w, tmp_path / "neon.safetensors")


def row_results(path, weights, w: float = 1.5):
    final = {"neon": {"fid": 1.3812, "is_mean": 250.5, "seeds": "0-49999"}, "base": {"fid": 1.7834, "is_mean": 240.0}}
    told = {
        "row": "edm/cifar10_cond",
        "paper": {"neon_fid": 1.38},
        "guidance": "cfg",
        "best": {"w": w, "snapshot": "s", "guidance": 2.7},
        "final": final,
        "intervals": {"neon": {"low": 1.36, "high": 1.4}},
        "provenance": {
            "files": {"reference": {"path": "fid_stats/cifar10-32x32.npz", "sha256": "0" * 64}},
            "neon": {"path": "neon.safetensors", "sha256": sha256_file(weights)},
            "evaluate": {"settings": {"num_steps": 18}},
        },
    }
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(push_command, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 2), result.exception
    return result.exit_code, result.output


def test_card_tells_the_w_of_patterns_and_what_was_kept(tmp_path):
    merged(tmp_path)
    steps = Steps(1.0, blocks=(("a", 0.5),), keep=("a*",))
    weights = merge_files(tmp_path / "mine.safetensors", tmp_path / "syn.safetensors", steps, tmp_path / "blocks")
    code, output = run(weights, "me/model", "--licence", "mit", "--dry_run")
    assert code == 0 and "w = 1; `a`: w = 0.5; `a*` from the base." in output


def test_weights_card_and_results_in_one_commit(hub, tmp_path):
    weights = merged(tmp_path)
    results = row_results(tmp_path / "measured.json", weights)
    (tmp_path / "report.html").write_text("<html>", encoding="utf-8")
    code, output = run(weights, "me/model", "--results", results, "--licence", "mit", "--base_model", "me/base")
    assert code == 0 and f"{hub.url}/me/model/commit/" in output, output
    there = hub.pushed["me/model"]
    assert set(there) == {"neon.safetensors", "README.md", "results.json", "report.html"} and hub.private["me/model"]
    assert there["neon.safetensors"] == weights.read_bytes() and there["results.json"] == results.read_bytes()
    assert len([path for _, path, _ in hub.requests if "/commit/" in path]) == 1

    card = ModelCard(there["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "me/base") and "neon" in card.data.tags
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"fid": 1.3812, "is": 250.5}
    for part in (
        "w = 1.5",
        "`edm/cifar10_cond`",
        "| FID | 1.783 | 1.381 |",
        "1.36 to 1.4",
        "`cfg=2.7`",
        "cifar10-32x32",
    ):
        assert part in card.text, part
    for name in ("mine.safetensors", "syn.safetensors", "neon.safetensors"):
        assert f"| `{name}` | `{sha256_file(tmp_path / name)}` |" in card.text


def test_results_of_calculate_fid(hub, tmp_path):
    weights = merged(tmp_path)
    told = {"fid": 2.5, "seeds": "0-9", "settings": {"cfg": 2.0}, "network_sha256": sha256_file(weights)}
    (tmp_path / "r.json").write_text(json.dumps(told), encoding="utf-8")
    assert run(weights, "me/m", "--results", tmp_path / "r.json", "--licence", "mit", "--public")[0] == 0
    assert "| FID | 2.5 |" in hub.pushed["me/m"]["README.md"].decode() and not hub.private["me/m"]


def test_folder_goes_whole_and_the_card_of_the_base_does_not(hub, tmp_path):
    ends = []
    for name, value in (("base", 1.0), ("syn", 2.0)):
        (tmp_path / name / "unet").mkdir(parents=True)
        save_file({"a": torch.full((3,), value)}, tmp_path / name / "unet" / "model.safetensors")
        (tmp_path / name / "README.md").write_text("of the base", encoding="utf-8")
        ends.append(tmp_path / name)
    from neon_run.merging.folders import merge_folders

    out = merge_folders(*ends, 1.0, tmp_path / "out")
    code, output = run(out, "me/pipe", "--licence", "openrail")
    assert code == 0, output
    there = hub.pushed["me/pipe"]
    assert set(there) == {"unet/model.safetensors", "neon_merge.json", "README.md"}
    assert b"of the base" not in there["README.md"] and b"Not measured" in there["README.md"]
    assert "--licence: say under which licence" in run(out, "me/pipe")[1]


def test_licence_follows_the_published_base(hub, tmp_path):
    bound = merged(tmp_path, "edm-cifar10-32x32-cond-vp.pkl")
    code, output = run(bound, "me/m", "--dry_run")
    assert code == 0 and "license: cc-by-nc-sa-4.0" in output and not hub.requests
    code, output = run(bound, "me/m", "--licence", "mit")
    assert code == 2 and "non-commercial use only; leave the flag out" in output and not hub.requests
    again = merge_files(bound, tmp_path / "syn.safetensors", 0.1, tmp_path / "again.safetensors")
    assert "license: cc-by-nc-sa-4.0" in run(again, "me/m", "--dry_run")[1]  # the base's base binds too
    assert "license: mit" in run(merged(tmp_path, "var_d16.pth"), "me/m", "--dry_run")[1]
    assert "base_model: FoundationVision/var" in run(merged(tmp_path, "var_d16.pth"), "me/m", "--dry_run")[1]


def test_card_that_somebody_wrote_stays(hub, tmp_path):
    weights = merged(tmp_path)
    hub.pushed["me/m"], hub.files["README.md"] = {"README.md": b"by hand"}, b"by hand"
    code, output = run(weights, "me/m", "--licence", "mit")
    assert code == 2 and "--replace_card" in output and hub.pushed["me/m"] == {"README.md": b"by hand"}
    assert run(weights, "me/m", "--licence", "mit", "--replace_card")[0] == 0
    assert MARK in hub.pushed["me/m"]["README.md"].decode()
    assert run(weights, "me/m", "--licence", "apache-2.0")[0] == 0  # our own card is renewed
    assert b"license: apache-2.0" in hub.pushed["me/m"]["README.md"]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "asks for a login"), (403, "may not write"), (500, "not pushed")]
)
def test_refusals_of_the_hub_are_one_line(hub, tmp_path, status, message):
    hub.push_status = status
    code, output = run(merged(tmp_path), "me/m", "--licence", "mit")
    assert code == 2 and message in output and output.count("\n") == 1 and not hub.pushed


def test_no_hub_and_wrong_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    weights = merged(tmp_path)
    for repo in ("me/m", "not a name"):
        code, output = run(weights, repo, "--licence", "mit")
        assert code == 2 and "not pushed" in output and "Traceback" not in output


def test_what_is_not_ours_or_not_measured_here_is_refused(tmp_path):
    weights = merged(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"fid": 1.0, "network_sha256": "1" * 64}), encoding="utf-8")
    (tmp_path / "none.json").write_text(json.dumps({"loss": 1.0}), encoding="utf-8")
    (tmp_path / "text.json").write_text("FID 1", encoding="utf-8")
    torch.save({}, tmp_path / "x.pth")
    for arguments, message in (
        ([tmp_path / "mine.safetensors", "me/m"], "records no merge"),
        ([tmp_path / "x.pth", "me/m"], "is no safetensors file"),
        ([tmp_path / "nowhere", "me/m"], "does not exist"),
        ([tmp_path, "me/m"], "has no neon_merge.json"),
        ([weights, "me/m", "--results", tmp_path / "other.json"], "measured other weights"),
        ([weights, "me/m", "--results", tmp_path / "none.json"], "holds no metric that we know"),
        ([weights, "me/m", "--results", tmp_path / "text.json"], "is not JSON"),
        ([weights, "me/m", "--results", row_results(tmp_path / "w.json", weights, w=1.0)], "is of w = 1, "),
        ([weights, "me/m"], "--licence: say under which licence"),
    ):
        code, output = run(*arguments)
        assert code == 2 and message in output, output
