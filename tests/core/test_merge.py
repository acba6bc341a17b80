"""theta_base - w (theta_syn - theta_base), for state dicts, a live module and files."""

import json
import os
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from launch import kill_when, launch, start
from needs import SCALES
from torch import nn

from neon_core.merge import NeonWeights, matches, neon_merge
from neon_files.atomic import sha256_file
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_run.merging.command import merge_command
from neon_run.merging.files import merge_files
from neon_run.merging.rules import find_rule, find_rules
from neon_run.merging.steps import steps_of

ROOT = Path(__file__).resolve().parents[2]


RULES = find_rules()


def random_state(seed: int, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    state = {"a.weight": torch.randn(7, 5, generator=generator), "a.bias": torch.randn(7, generator=generator)}
    state = {name: value.to(dtype) for name, value in state.items()}
    state["mask"] = torch.triu(torch.full((4, 4), -torch.inf, dtype=dtype), 1)
    return state | {"steps": torch.tensor(seed)}


BASE, SYN = random_state(1), random_state(2)


def same(found, expected, ordered: bool = True) -> bool:
    """Bit for bit, and names in order."""
    if not ordered:
        found, expected = (dict(sorted(state.items())) for state in (found, expected))
    bits = [[value.reshape(-1).view(torch.uint8) for value in state.values()] for state in (found, expected)]
    return list(found) == list(expected) and all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def floats(state: dict) -> dict:
    return {name: state[name] for name in ("a.weight", "a.bias")}


# The equation


def test_against_the_equation_in_double_precision():
    for w in (-1.0, 0.3, 1.5, 3.0):
        merged = neon_merge(BASE, SYN, w)
        for name, base in floats(BASE).items():
            exact = base.double() - w * (SYN[name].double() - base.double())
            torch.testing.assert_close(merged[name].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_w_zero_is_the_base_bit_for_bit(dtype):
    base, syn = random_state(1, dtype), random_state(2, dtype)
    base["a.bias"][:2] = torch.tensor([-0.0, 0.0])
    merged = neon_merge(base, syn, 0.0)
    assert same(merged, base) and merged["a.bias"].data_ptr() != base["a.bias"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_w_minus_one_is_self_training(dtype):
    base, syn = random_state(1, dtype), random_state(2, dtype)
    merged = neon_merge(base, syn, -1.0)
    rounding = {torch.float64: 1e-15, torch.float32: 5e-7}.get(dtype, 0.0)  # half precision is computed exactly enough
    for name in floats(base):
        torch.testing.assert_close(merged[name], syn[name], rtol=0, atol=rounding)


def test_linear_in_w():
    at = {w: neon_merge(BASE, SYN, w)["a.weight"].double() for w in (0.5, 1.0, 2.0)}
    torch.testing.assert_close(at[2.0] - at[1.0], 2 * (at[1.0] - at[0.5]), rtol=0, atol=2e-6)


def test_base_and_synthetic_swapped_with_w_mirrored():
    there, back = neon_merge(BASE, SYN, 0.7), neon_merge(SYN, BASE, -1.7)
    torch.testing.assert_close(floats(there), floats(back), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    base, syn = ({"a": torch.tensor([v], dtype=dtype)} for v in (1.0, 1.0 + torch.finfo(dtype).eps))
    merged = neon_merge(base, syn, 0.5)["a"]
    assert merged.dtype == dtype and merged == (1 - 0.5 * torch.finfo(dtype).eps)  # exact, below 1 numbers are denser
    base["a"], syn["a"] = (
        torch.full((1,), -40000.0, dtype=torch.float16),
        torch.full((1,), 40000.0, dtype=torch.float16),
    )
    assert neon_merge(base, syn, -0.5)["a"] == 0  # the difference alone is beyond float16


def test_mixed_precision_takes_the_type_of_the_base():
    syn = {name: value.to(torch.float16) if value.is_floating_point() else value for name, value in SYN.items()}
    merged = neon_merge(BASE, syn, 1.5)
    assert {name: value.dtype for name, value in merged.items()} == {name: value.dtype for name, value in BASE.items()}
    torch.testing.assert_close(floats(merged), floats(neon_merge(BASE, SYN, 1.5)), rtol=0, atol=5e-3)


def test_masks_and_whole_numbers_come_from_the_base():
    merged = neon_merge(BASE, SYN, 1.5)
    assert torch.equal(merged["mask"], BASE["mask"]) and merged["steps"] == BASE["steps"]
    kept = neon_merge(BASE, SYN, 1.5, keep=("a.bias",))
    assert torch.equal(kept["a.bias"], BASE["a.bias"]) and torch.equal(kept["a.weight"], merged["a.weight"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sides", [("base",), ("synthetic",), ("base", "synthetic")])
def test_parameter_that_is_not_finite_is_named(bad, sides):
    ends = {"base": random_state(1), "synthetic": random_state(2)}
    for side in sides:
        ends[side]["a.weight"][3, 3] = bad
    with pytest.raises(UserError, match=rf"a\.weight: not finite in the {' and the '.join(sides)} checkpoint"):
        neon_merge(*ends.values(), 1.5)


def test_overflow_is_named():
    ends = {"a": torch.full((1,), -60000.0).half()}, {"a": torch.full((1,), 60000.0).half()}
    with pytest.raises(UserError, match=r"a: w = 1\.5 leads beyond the range of torch\.float16"):
        neon_merge(*ends, 1.5)


@pytest.mark.parametrize("w", [float("nan"), float("inf"), -float("inf")])
def test_w_must_be_a_number(w):
    for merge in (lambda: neon_merge(BASE, SYN, w), lambda: merge_files("a", "b", w, "c")):
        with pytest.raises(UserError, match="must be a finite number"):
            merge()


def test_other_network_is_told():
    syn = {name: value for name, value in SYN.items() if name != "mask"} | {"new": torch.ones(1)}
    syn["a.bias"] = torch.ones(6)
    with pytest.raises(UserError) as caught:
        neon_merge(BASE, syn, 1.0)
    for part in ("1 of 4 keys missing in the synthetic checkpoint (mask)", "(new)", "a.bias: [7] in the base, [6] in"):
        assert part in caught.value.message
    for rule in set(RULES) - {"neon"}:
        with pytest.raises(UserError, match=r"a\.bias: \[7\]"):
            neon_merge(BASE, syn, 1.0, rule=RULES[rule])
    with pytest.raises(UserError, match="--rule theirs: unknown; choose one of neon, official-edm"):
        find_rule("theirs")


def test_all_rules_agree_on_plain_parameters():
    results = [neon_merge(floats(BASE), floats(SYN), 1.5, rule=rule) for rule in RULES.values()]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-6)


# What is kept, and what is no plain tensor


def batch_norm_state(seed: int) -> dict:
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    state = {name: random(seed + number, value) for number, (name, value) in enumerate(net.state_dict().items())}
    return state | {"1.running_var": state["1.running_var"].abs() * (4.0 if seed > 10 else 1.0)}


def random(seed: int, like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.full_like(like, seed)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def test_running_statistics_come_from_the_base_alike_in_dict_module_and_file(tmp_path):
    base, syn = batch_norm_state(1), batch_norm_state(20)  # extrapolated, the variance would be negative
    merged = neon_merge(base, syn, 1.5)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(merged[name], base[name])
    assert not torch.equal(merged["1.weight"], base["1.weight"])
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    net.load_state_dict(syn)  # whatever the module held, it gets the base's
    moved = NeonWeights(net, base, syn)
    moved.set(1.5)
    assert same(net.state_dict(), merged) and set(moved.kept) == {n for n in base if "running" in n or "num_b" in n}
    torch.save(base, tmp_path / "base")
    torch.save({name: value for name, value in syn.items() if "num_batches" not in name}, tmp_path / "syn")
    out = merge_files(tmp_path / "base", tmp_path / "syn", 1.5, tmp_path / "out")
    assert same(read_checkpoint(out).state, merged)
    assert torch.isfinite(net.eval()(torch.ones(2, 5))).all()


def test_directions_of_spectral_norm_come_from_the_base():
    nets = [nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)) for _ in range(2)]
    base, syn = (net.state_dict() for net in nets)
    merged = neon_merge(base, syn, 1.5)
    for end in ("_u", "_v"):
        assert torch.equal(merged[f"parametrizations.weight.0.{end}"], base[f"parametrizations.weight.0.{end}"])
    assert not torch.equal(merged["parametrizations.weight.original"], base["parametrizations.weight.original"])


def test_file_of_a_known_network_is_the_network_that_was_searched(tmp_path):
    """Whatever the buffers of a snapshot hold: the module moves its parameters, and so does the merge of the files."""
    base, syn = BASE | {"table": torch.ones(3)}, SYN | {"table": torch.full((3,), 5.0), "mask": torch.zeros(4, 4)}
    net = Net()
    net.register_buffer("table", torch.zeros(3))
    NeonWeights(net, base, syn).set(1.5)
    ends = save(tmp_path / "base", base, "torch"), save(tmp_path / "syn", syn, "torch")
    merged = read_checkpoint(merge_files(*ends, steps_of(net, 1.5), tmp_path / "out")).state
    assert same(merged, net.state_dict(), ordered=False) and torch.equal(merged["table"], base["table"])
    assert not torch.equal(neon_merge(base, syn | {"mask": BASE["mask"]}, 1.5)["table"], base["table"])


def test_official_rules_know_no_statistics():
    base, syn = batch_norm_state(1), batch_norm_state(20)
    official = neon_merge(base, syn, 1.5, rule=find_rule("official-edm"))
    assert (official["1.running_var"] < 0).any()


def test_patterns_fit_a_name_or_what_follows_a_dot_in_it():
    for pattern, names in (("norm.*", ["norm.weight", "block.0.norm.weight"]), ("b.bias", ["b.bias", "a.b.bias"])):
        assert all(matches(name, [pattern]) for name in names)
        assert not matches("prenorm.weight", [pattern]) and not matches("ab.bias", [pattern])


def test_kept_tensors_need_no_counterpart():
    syn = {"a.weight": SYN["a.weight"], "a.bias": torch.ones(3), "mask": SYN["mask"]}
    merged = neon_merge(BASE, syn, 1.5, keep=("bias", "steps"))
    assert torch.equal(merged["a.bias"], BASE["a.bias"]) and torch.equal(merged["steps"], BASE["steps"])
    net = Net().load(BASE)
    NeonWeights(net, BASE, syn, keep=("bias",)).set(1.5)
    assert same(net.state_dict(), merged, ordered=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_computed_in_float32(dtype):
    base, syn = ({"a": torch.randn(64, generator=torch.Generator().manual_seed(s)).to(dtype)} for s in (1, 2))
    merged = neon_merge(base, syn, 1.5)["a"]
    exact = base["a"].float() - 1.5 * (syn["a"].float() - base["a"].float())
    assert merged.dtype == dtype and torch.equal(merged.float(), exact.to(dtype).float())
    assert same(neon_merge(base, syn, 0.0), base)
    far = {"a": torch.full((64,), -torch.finfo(dtype).max).to(dtype)}
    with pytest.raises(UserError, match=r"leads beyond the range of torch\.float8"):  # and does not end at 448
        neon_merge(far, base, 2.0)


def test_complex_numbers_are_merged(tmp_path):
    base, syn = ({"a": torch.view_as_complex(random_state(seed)["a.weight"][:, :2].contiguous())} for seed in (1, 2))
    merged = neon_merge(base, syn, 1.5)
    assert_close = torch.testing.assert_close
    assert_close(merged["a"], base["a"] - 1.5 * (syn["a"] - base["a"]))
    net = nn.ParameterDict({"a": nn.Parameter(torch.zeros(7, dtype=torch.complex64))})
    NeonWeights(net, base, syn).set(1.5)
    assert torch.equal(net["a"], merged["a"])
    ends = save(tmp_path / "base", base, "torch"), save(tmp_path / "syn", syn, "safetensors")
    assert torch.equal(read_checkpoint(merge_files(*ends, 1.5, tmp_path / "out")).state["a"], merged["a"])
    syn["a"][0] = complex(0, torch.nan)
    with pytest.raises(UserError, match="a: not finite in the synthetic"):
        neon_merge(base, syn, 1.5)


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8)
    return {
        "a sparse tensor": torch.eye(2).to_sparse(),
        "a meta tensor": torch.ones(2, 2, device="meta"),
        "type torch.quint8": quantized,
        "a Codes": torch.ones(2, 2).as_subclass(type("Codes", (torch.Tensor,), {})),
        "type torch.float8_e8m0fnu": torch.ones(2, 2).to(getattr(torch, "float8_e8m0fnu", torch.float32)),
    }


ODD = pytest.mark.parametrize(
    ("kind", "tensor"),
    [pytest.param(*item, marks=SCALES if "e8m0" in item[0] else ()) for item in odd_tensors().items()],
)


@ODD
def test_what_is_no_dense_tensor_of_numbers_is_refused_in_one_sentence(kind, tensor):
    for ends, side in ((({"a": tensor}, {"a": torch.ones(2, 2)}), "base"), (({"a": tensor},) * 2, "base")):
        with pytest.raises(UserError, match=f"a: is .*{kind}.* in the {side} checkpoint; save the network as plain"):
            neon_merge(*ends, 1.0)


def test_fractions_against_whole_or_complex_numbers_are_refused():
    for other in (torch.ones(2, dtype=torch.int8), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(UserError, match=r"a: torch.* in the base, torch.* in the synthetic"):
            neon_merge({"a": torch.ones(2)}, {"a": other}, 1.0)
        with pytest.raises(UserError, match=r"a: torch.* in the base, torch.* in the synthetic"):
            neon_merge({"a": other}, {"a": torch.ones(2)}, 1.0)


# A live module


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a = nn.Linear(5, 7, dtype=dtype)
        self.register_buffer("mask", random_state(0, dtype)["mask"])
        self.register_buffer("steps", torch.tensor(1))

    def load(self, state):
        self.load_state_dict(state)
        return self


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_moves_without_drift(dtype):
    base, syn = random_state(1, dtype), random_state(2, dtype)
    net = Net(dtype).load(base)
    moved = NeonWeights(net, base, syn)
    for w in (1.5, -1.0, 3.0, 0.1, 1.5):
        moved.set(w)
        assert same(net.state_dict(), neon_merge(base, syn, w), ordered=False) and moved.w == w
    moved.set(0.0)
    assert same(net.state_dict(), base, ordered=False)


def test_module_may_lend_its_own_weights_as_an_end():
    net = Net().load(BASE)
    moved = NeonWeights(net, net.state_dict(), SYN)
    moved.set(2.0)
    moved.set(1.5)
    assert same(net.state_dict(), neon_merge(BASE, SYN, 1.5), ordered=False)


@pytest.mark.parametrize("wrap", [torch.compile, lambda net: nn.ModuleDict({"module": net})])
def test_wrapped_module_is_moved_by_the_names_of_the_network(wrap):
    net = Net().load(BASE)
    wrapped = wrap(net)
    NeonWeights(wrapped, BASE, SYN).set(1.5)
    assert same(net.state_dict(), neon_merge(BASE, SYN, 1.5), ordered=False)
    again = neon_merge(wrapped.state_dict(), SYN, 0.0)
    assert same(again, wrapped.state_dict())


def test_module_keeps_its_buffers_and_gradients_flags():
    net = Net().load(BASE)
    net.a.bias.requires_grad_(False)
    parameters = dict(net.named_parameters())
    NeonWeights(net, BASE, SYN | {"mask": torch.zeros(4, 4)}).set(1.5)
    assert torch.equal(net.mask, BASE["mask"]) and net.steps == 1
    assert all(parameters[name] is value for name, value in net.named_parameters())
    assert net.a.weight.requires_grad and not net.a.bias.requires_grad and net.a.weight.grad_fn is None


def test_module_goes_back_to_the_base_on_an_error():
    broken = SYN | {"a.bias": torch.full((7,), torch.nan)}
    net = Net().load(BASE)
    moved = NeonWeights(net, BASE, broken)
    with pytest.raises(UserError, match=r"a\.bias: not finite in the synthetic"):
        moved.set(1.0)
    assert same(net.state_dict(), BASE, ordered=False) and moved.w == 0
    with pytest.raises(UserError, match="1 of 2 keys missing in the synthetic checkpoint"):
        NeonWeights(net, BASE, {"a.bias": SYN["a.bias"]})


def test_step_length_scales_with_the_difference():
    net = Net().load(BASE)
    expected = torch.cat([(SYN[name] - BASE[name]).flatten() for name in floats(BASE)]).norm().item()
    assert NeonWeights(net, BASE, SYN).distance() == pytest.approx(expected, rel=1e-6)
    assert NeonWeights(net, BASE, BASE).distance() == 0


def test_ends_are_held_without_copies():
    moved = NeonWeights(Net(), BASE, SYN)
    assert all(moved.syn[name].data_ptr() == SYN[name].data_ptr() for name in moved.syn)
    assert moved.base.keys() == floats(BASE).keys()


# Files


def save(path: Path, state: dict, container: str) -> Path:
    if container == "safetensors":
        write_checkpoint(path, state, config={"class": "Net", "kwargs": {"width": 5}}, metadata={"recipe": "row"})
    elif container == "nested":
        torch.save({"model_ema": {f"module.{name}": value for name, value in state.items()}, "epoch": 1}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "torch")
    return path


CONTAINERS = ("safetensors", "torch", "legacy", "nested")


@pytest.mark.parametrize(("one", "other"), list(product(CONTAINERS, CONTAINERS)))
def test_files_of_any_containers_give_what_state_dicts_give(tmp_path, one, other):
    base, syn = save(tmp_path / "base", BASE, one), save(tmp_path / "syn", SYN, other)
    out = merge_files(base, syn, 1.5, tmp_path / "new" / "out.safetensors")
    assert same(read_checkpoint(out).state, neon_merge(BASE, SYN, 1.5))


@pytest.mark.parametrize("rule", RULES)
def test_files_under_every_rule(tmp_path, rule):
    base, syn = {**BASE, "half": torch.ones(3).half()}, {**SYN, "half": torch.full((3,), 2.0).half()}
    if rule != "neon":
        base["only in base"], syn["only in syn"] = torch.ones(2), torch.ones(2)
    paths = save(tmp_path / "base", base, "torch"), save(tmp_path / "syn", syn, "torch")
    out = merge_files(*paths, 1.5, tmp_path / "out", rule=rule)
    assert same(read_checkpoint(out).state, neon_merge(base, syn, 1.5, rule=RULES[rule]))


def test_pickled_networks_merge_to_safetensors(tmp_path, golden_data):
    base, aux = (golden_data / "imm" / f"imm_tiny_{name}.pkl" for name in ("base", "aux"))
    with pytest.raises(UserError, match=r"model\.final_layer\.linear\.bias: not finite in the synthetic checkpoint"):
        merge_files(base, aux, 0.8, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    out = merge_files(base, aux, 0.8, tmp_path / "out", rule="official-imm")
    ends = [read_checkpoint(path).state for path in (base, aux)]
    merged = read_checkpoint(out)
    assert same(merged.state, neon_merge(*ends, 0.8, rule=find_rule("official-imm")))
    assert merged.config == read_checkpoint(base).config and merged.config["class"] == "IMMPrecond"


def test_provenance_is_in_the_file(tmp_path):
    base, syn = save(tmp_path / "base", BASE, "safetensors"), save(tmp_path / "syn", SYN, "torch")
    merged = read_checkpoint(merge_files(base, syn, 1.5, tmp_path / "out"))
    neon = merged.metadata["neon"]
    assert (neon["w"], neon["rule"]) == (1.5, "neon")
    assert neon["base"] == {"file": "base", "sha256": sha256_file(base), "metadata": {"recipe": "row"}}
    assert neon["synthetic"]["sha256"] == sha256_file(syn)
    assert merged.config == {"class": "Net", "kwargs": {"width": 5}}


def test_inputs_are_never_overwritten(tmp_path):
    base, syn = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch")
    before = syn.read_bytes()
    (tmp_path / "link").symlink_to(syn)
    for out in (syn, tmp_path / "link"):
        with pytest.raises(UserError, match="is one of the inputs"):
            merge_files(base, syn, 1.0, out)
    assert syn.read_bytes() == before


def test_command_line(tmp_path):
    base, syn = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch")
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(merge_command, [str(base), str(syn), "-w", "-1", "-o", str(out)])
    assert result.exit_code == 0 and result.stdout == f"{out} | w=-1 | rule=neon | base=base | syn=syn\n"
    torch.testing.assert_close(floats(read_checkpoint(out).state), floats(SYN), rtol=0, atol=5e-7)
    for arguments, message in (
        ([str(base), str(tmp_path / "none.pth"), "-w", "1", "-o", str(out)], "none.pth: does not exist"),
        ([str(base), str(syn), "-w", "nan", "-o", str(out)], "must be a finite number"),
        ([str(base), str(syn), "-w", "1", "-o", str(tmp_path)], "is a folder"),
        ([str(base), str(syn), "-o", str(out)], "Missing option"),
        ([str(base), str(syn), "-w", "1", "-o", str(out), "--rule", "x"], "official-var"),
    ):
        result = CliRunner().invoke(merge_command, arguments)
        assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def merge_command_line(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(merge_command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_w_by_pattern_and_kept_tensors_on_the_command_line(tmp_path):
    base, syn, out = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch"), tmp_path / "out"
    steps = ["-w", "1.0", "--w", "a.*=3", "--w", "bias=0.5", "--exclude", "mask", "--keep", "step?"]
    code, told, said = merge_command_line(base, syn, *steps, "-o", out)
    assert code == 0 and told.startswith(f"{out} | w=1 | a.*=3 | bias=0.5 | rule=neon")
    assert f"{out}: 2 tensors kept from the base (mask, steps)" in said
    merged = read_checkpoint(out)
    for name, w in (("a.weight", 3.0), ("a.bias", 0.5)):  # the last that fits counts
        assert torch.equal(merged.state[name], neon_merge(BASE, SYN, w)[name])
    record = merged.metadata["neon"]
    assert record["w_by_pattern"] == [["a.*", 3.0], ["bias", 0.5]] and record["keep"] == ["mask", "step?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "1", "-w", "2"], "give one number for all tensors, beside any PATTERN=W; there are 2"),
        (["-w", "a.*=1"], "there are 0"),
        (["-w", "much"], "-w much: is no number"),
        (["-w", "1", "-w", "a.*=nan"], "must be a finite number"),
        (["-w", "1", "-w", "b.*=2"], "--w b.*: fits no tensor; there are a.weight, a.bias, mask"),
        (["-w", "1", "--keep", "b.*"], "--keep b.*: fits no tensor"),
        (["-w", "1", "--keep", "a.*", "--rule", "official-edm"], "leave out --keep and --w PATTERN=W"),
        (["-w", "1", "--entry", "a", "--entry", "b", "--entry", "c"], "--entry: once for both files, or twice"),
        (["-w", "1", "--entry", "ema"], "has no entry 'ema'"),
        (["-w", "1", "--scale", "2"], "--scale: applies to LoRA adapters"),
        (["-w", "1", "-o", "out.onnx"], "-o out.onnx: .onnx is not written; name a .safetensors or a .pt file"),
    ],
)
def test_wrong_steps_are_told(tmp_path, arguments, message):
    base, syn = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch")
    code, _, said = merge_command_line(base, syn, "-o", tmp_path / "out", *arguments)
    assert code == 2 and message in said and sorted(os.listdir(tmp_path)) == ["base", "syn"]


def test_entry_chooses_in_both_files_or_in_each(tmp_path):
    third = random_state(3)
    torch.save({"model": BASE, "ema": third}, tmp_path / "base")
    torch.save({"model": SYN, "ema": third}, tmp_path / "syn")
    torch.save(SYN, tmp_path / "flat")
    for entries, syn, expected in (
        (["model"], "syn", neon_merge(BASE, SYN, 1.5)),
        (["ema", "model"], "syn", neon_merge(third, SYN, 1.5)),
        (["model", ""], "flat", neon_merge(BASE, SYN, 1.5)),
    ):
        flags = [flag for entry in entries for flag in ("--entry", entry)]
        code, _, said = merge_command_line(tmp_path / "base", tmp_path / syn, "-w", 1.5, *flags, "-o", tmp_path / "out")
        assert code == 0 and "takes the" not in said
        assert same(read_checkpoint(tmp_path / "out").state, expected)
    code, _, said = merge_command_line(tmp_path / "base", tmp_path / "syn", "-w", 1.5, "-o", tmp_path / "out")
    assert code == 0 and said.count("takes the averaged weights 'ema', not 'model'") == 2


@pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.bin", "out.ckpt", "out.pth.tar", "OUT.PT"])
def test_torch_files_are_written_where_the_suffix_says_so(tmp_path, name):
    base, syn = save(tmp_path / "base", BASE, "safetensors"), save(tmp_path / "syn", SYN, "torch")
    out = merge_files(base, syn, 1.5, tmp_path / name)
    assert same(torch.load(out, weights_only=True), neon_merge(BASE, SYN, 1.5))
    told = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert told["neon"]["w"] == 1.5 and told["neon"]["base"]["sha256"] == sha256_file(base)


WRAPPED = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod. within": lambda name: name.replace("a.", "a._orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('a.', 'a._checkpoint_wrapped_module.')}",
    "Lightning": lambda name: f"model.{name}",
    "all": lambda name: f"model._orig_mod.module.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_names_that_wrappers_change_on_one_side(tmp_path, wrapper, container):
    for wrapped, plain in ((BASE, SYN), (SYN, BASE)):
        renamed = {WRAPPED[wrapper](name): value for name, value in wrapped.items()}
        ends = [save(tmp_path / "wrapped", renamed, container), save(tmp_path / "plain", plain, container)]
        if wrapped is SYN:
            ends.reverse()
        merged = read_checkpoint(merge_files(*ends, 1.5, tmp_path / "out")).state
        assert same(dict(zip(BASE, merged.values(), strict=True)), neon_merge(BASE, SYN, 1.5))


@ODD
def test_files_with_odd_tensors_are_refused_in_one_sentence(tmp_path, kind, tensor):
    if "Codes" in kind:
        pytest.skip("a class of the test's own is not saved")
    for name in ("base", "syn"):
        torch.save({"a": tensor, "b": torch.ones(1)}, tmp_path / name)
    code, _, said = merge_command_line(tmp_path / "base", tmp_path / "syn", "-w", 1, "-o", tmp_path / "out")
    assert code == 2 and " a is " in said.replace("a: is", " a is ") and said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["base", "syn"]


def test_quantized_files_are_refused(tmp_path):
    for name in ("base", "syn"):
        torch.save({"l.weight": torch.ones(4, 4, dtype=torch.int8), "l.SCB": torch.ones(4)}, tmp_path / name)
    code, _, said = merge_command_line(tmp_path / "base", tmp_path / "syn", "-w", 1, "-o", tmp_path / "out")
    assert code == 2 and "base: l.weight holds quantized numbers, whose scale is l.SCB" in said
    state = torch.load(tmp_path / "base")
    for merge in (lambda: neon_merge(state, state, 1.0), lambda: NeonWeights(nn.Linear(4, 4), state, state)):
        with pytest.raises(UserError, match=r"the base.*: l\.weight holds quantized numbers"):
            merge()


def test_output_of_the_longest_name(tmp_path):
    base, syn = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch")
    name = "n" * (255 - len(".safetensors")) + ".safetensors"
    assert same(read_checkpoint(merge_files(base, syn, 1.5, tmp_path / name)).state, neon_merge(BASE, SYN, 1.5))


SLOW_MERGE = """
import sys, time
from neon_run.merging import files
rule = files.find_rule("neon")
def slow(name, base, syn, w):
    if base.numel():  # empty ones ask for the type of the result
        open(sys.argv[4], "w").close()
        time.sleep(600)
    return rule(name, base, syn, w)
files.find_rule = lambda name: slow
files.merge_files(sys.argv[1], sys.argv[2], 1.5, sys.argv[3])
"""


def test_killed_merge_leaves_no_final_file_and_the_next_run_cleans_up(tmp_path):
    base, syn = save(tmp_path / "base", BASE, "torch"), save(tmp_path / "syn", SYN, "torch")
    out = tmp_path / "out"
    merging = tmp_path / "merging"
    process = start("-c", SLOW_MERGE, base, syn, out, merging)
    kill_when(process, merging.exists)
    merging.unlink()
    left = set(os.listdir(tmp_path))
    assert "out" not in left and len(left) == 3
    merge_files(base, syn, 1.5, out)
    assert set(os.listdir(tmp_path)) == {"base", "syn", "out"}
    assert same(read_checkpoint(out).state, neon_merge(BASE, SYN, 1.5))


PEAK_MERGE = """
import ctypes, sys, threading, time
from neon_run.merging.files import merge_files

M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # freed memory goes back to the system at once

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

merge_files(sys.argv[1], sys.argv[2], 1.5, sys.argv[3])  # everything imported and warm
start = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
merge_files(sys.argv[4], sys.argv[5], 1.5, sys.argv[3])
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_peak_memory_is_about_two_of_the_largest_tensor(tmp_path, container):
    """12 tensors of 8 MiB, 96 MiB a model: mapped pages aside, no more than 2.3 tensors are in memory at once."""
    size = 1 << 23
    small = [save(tmp_path / f"small{i}", state, container) for i, state in enumerate((BASE, SYN))]
    big = []
    for i in range(2):
        state = {f"layer{k}": torch.full((size // 4,), float(i + k)) for k in range(12)}
        big.append(save(tmp_path / f"big{i}", state, container))
    result = launch("-c", PEAK_MERGE, *small, tmp_path / "out", *big)
    peak = int(result.stdout) / size
    print(f"peak: {peak:.2f} tensors of {size >> 20} MiB")
    assert 0.5 < peak < 2.3, result.stderr
    merged = read_checkpoint(tmp_path / "out").state
    assert merged["layer5"][0] == 5 - 1.5 * 1


def test_metadata_of_any_kind_survives(tmp_path):
    write_checkpoint(tmp_path / "base", BASE, metadata={"infinite": float("inf"), "text": "ü", "lr": 1e-4})
    write_checkpoint(tmp_path / "syn", SYN, metadata={"neon": {"w": 0.1}})
    merged = read_checkpoint(merge_files(tmp_path / "base", tmp_path / "syn", 1.0, tmp_path / "out"))
    assert merged.metadata["infinite"] == float("inf") and merged.metadata["text"] == "ü"
    assert json.loads(json.dumps(merged.metadata["neon"]["synthetic"]["metadata"])) == {"neon": {"w": 0.1}}
