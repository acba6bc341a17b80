"""Which weights of a file are taken, and which names of two files mean one tensor."""

import pytest
import torch
from torch import nn

from neon_files.checkpoint import Checkpoint, load_strict, read_checkpoint
from neon_files.errors import UserError
from neon_files.names import match_names

RAW = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2), "1.weight": torch.zeros(2, 2)}
EMA = {name: value + 1 for name, value in RAW.items()}


def read(tmp_path, content, entry=None) -> dict:
    torch.save(content, tmp_path / "x.pth")
    return read_checkpoint(tmp_path / "x.pth", entry).state


def same(state: dict, expected: dict) -> bool:
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


AVERAGED = {
    "state_dict_ema": ({"state_dict": RAW, "state_dict_ema": EMA}, "state_dict"),
    "net_ema": ({"net": RAW, "net_ema": EMA}, "net"),
    "params_ema": ({"params": RAW, "params_ema": EMA}, "params"),
    "ema_0.9999": ({"ema_0.9999": EMA, "model": RAW}, "model"),
    "modelEMA": ({"modelEMA": EMA, "model": RAW}, "model"),
    "unknown beside": ({"generator": RAW, "g_ema": EMA}, "generator"),
    "shadow": ({"model": RAW, "ema": {"decay": 0.99, "shadow": EMA}}, "model"),
    "within trainer": ({"trainer": {"model": RAW, "model_ema": EMA}}, "trainer.model"),
    "beside raw ones": ({**RAW, "model_ema": EMA}, "."),
    "optimizer of the average": ({"ema": EMA, "model": RAW, "ema_optimizer": {"state": RAW}}, "model"),
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_averaged_weights_win_and_the_others_can_be_had(tmp_path, capsys, layout):
    content, entry = AVERAGED[layout]
    assert same(read(tmp_path, content), EMA)
    said = capsys.readouterr().err
    assert "takes the averaged weights" in said and f"--entry {entry} takes those)" in said and said.count("\n") == 1
    assert same(read(tmp_path, content, entry), RAW)


def test_average_and_copy_in_one_dictionary(tmp_path, capsys):
    """As ema-pytorch saves them."""
    both = {
        f"{prefix}.{name}": state[name]
        for prefix, state in (("online_model", RAW), ("ema_model", EMA))
        for name in state
    }
    assert same(read(tmp_path, {"model": RAW, "ema": {"initted": torch.ones(1), "step": torch.ones(1), **both}}), EMA)
    assert "takes the averaged weights 'ema_model.', not 'online_model.'" in capsys.readouterr().err


def test_a_word_that_only_contains_ema_is_none(tmp_path, capsys):
    assert same(read(tmp_path, {"model": EMA, "schema": {"a": RAW["0.bias"]}, "cinema": {}}), EMA)
    assert capsys.readouterr().err == ""


def test_raw_weights_under_two_known_names_are_said(tmp_path, capsys):
    assert same(read(tmp_path, {"net": EMA, "model": RAW}), RAW)
    assert "takes 'model', not 'net' (neon merge: --entry net takes those)" in capsys.readouterr().err


def test_names_that_nobody_knows(tmp_path):
    assert same(read(tmp_path, {"generator": RAW, "optimizer": {"state": {0: EMA}}, "epoch": 1}), RAW)
    content = {"generator": RAW, "discriminator": EMA}
    with pytest.raises(UserError, match=r"several sets of weights \(generator, discriminator\); choose with --entry"):
        read(tmp_path, content)
    assert same(read(tmp_path, content, "discriminator"), EMA)


def test_average_without_names_is_refused_not_passed_over(tmp_path):
    content = {"model": RAW, "ema": {"decay": 0.99, "shadow_params": list(EMA.values())}}
    with pytest.raises(UserError, match=r"its entry 'ema' holds tensors without names \(shadow_params\).*--entry"):
        read(tmp_path, content)
    assert same(read(tmp_path, content, "model"), RAW)


WRAPPED = {
    "compiled blocks": lambda name: name.replace(".", "._orig_mod."),
    "checkpointed blocks": lambda name: name.replace(".", "._checkpoint_wrapped_module."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.')}",
    "DDP of compiled blocks": lambda name: f"module.{name.replace('.', '._orig_mod.')}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_parts_of_wrappers_are_dropped_wherever_they_stand(tmp_path, wrapper):
    assert same(read(tmp_path, {WRAPPED[wrapper](name): value for name, value in RAW.items()}), RAW)


def test_averaged_model_of_torch(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    assert same(read(tmp_path, averaged.state_dict()), net.state_dict())


def test_two_names_that_become_one_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.w and a\._orig_mod\.w both mean a\.w"):
        read(tmp_path, {"a.w": torch.ones(1), "a._orig_mod.w": torch.ones(1)})


@pytest.mark.parametrize(
    "wrap", [lambda n: f"model.{n}", lambda n: f"model.module.{n}", lambda n: n.replace(".", ".module.")]
)
def test_names_are_matched_when_the_other_side_lacks_the_wrapper(wrap):
    names = list(RAW)
    assert match_names(names, map(wrap, names)) == {wrap(name): name for name in names}
    assert match_names(map(wrap, names), names) == {name: wrap(name) for name in names}
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    load_strict(net, Checkpoint("x", "torch", {wrap(name): value for name, value in EMA.items()}))
    assert same(net.state_dict(), EMA)


def test_names_that_both_sides_have_are_left_alone():
    """A network may have modules that are called like wrappers."""
    names = ["model.module.w", "model.w", "module.w", "w"]
    assert match_names(names, names) == {name: name for name in names}
    assert match_names(["module.a", "head"], ["module.a", "head", "loss.x"]) == {
        n: n for n in ["module.a", "head", "loss.x"]
    }


def test_names_that_could_mean_two_are_refused():
    with pytest.raises(UserError, match=r"module\.model\.a and model\.a both mean a"):
        match_names(["a"], ["module.model.a", "model.a"])
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    state = {"module.0.weight": torch.ones(2, 2), "0.module.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError, match=r"^x: module\.0\.weight and 0\.module\.weight both mean 0\.weight"):
        load_strict(net, Checkpoint("x", "torch", state))
