"""The reverse merge of adapters equals the dense merge of the networks that they make."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from neon_core.merge import neon_merge
from neon_files.errors import UserError
from neon_run.merging.command import merge_command
from neon_run.merging.files import merge_files
from neon_run.merging.lora import is_adapter, merge_lora, read_adapter, reverse_lora
from neon_run.merging.weight_file import ADAPTER_CONFIG as CONFIG

SPELLINGS = {
    "peft": "base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight",
    "peft, named": "base_model.model.{}.lora_A.default.weight base_model.model.{}.lora_B.default.weight",
    "diffusers": "unet.{}.lora.down.weight unet.{}.lora.up.weight",
    "diffusers, processor": "unet.{}_lora.down.weight unet.{}_lora.up.weight",
    "kohya": "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight",
    "diffusers, text": "text_encoder.{}.lora_linear_layer.down.weight text_encoder.{}.lora_linear_layer.up.weight",
    "XLabs, image": "double_blocks.0.processor.{}_lora1.down.weight double_blocks.0.processor.{}_lora1.up.weight",
    "XLabs, text": "double_blocks.0.processor.{}_lora2.down.weight double_blocks.0.processor.{}_lora2.up.weight",
    "loralib": "blocks.0.{}.lora_A blocks.0.{}.lora_B",
    "torchtune": "layers.0.{}.lora_a.weight layers.0.{}.lora_b.weight",
    "parametrization": "layers.0.{}.parametrizations.weight.0.lora_A layers.0.{}.parametrizations.weight.0.lora_B",
    "peft, embedding": "base_model.model.{}.lora_embedding_A base_model.model.{}.lora_embedding_B",
}
SHAPES = {"q": (6, 5), "conv": (4, 3, 3, 3)}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(module: str, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, *into = SHAPES[module]
    return random(seed, rank, *into), random(seed + 1, out, rank, *(1 for _ in into[1:]))


def adapter_state(spelling: str, ranks: dict, seed: int, alpha: float | None = None, dtype=torch.float32) -> dict:
    state = {}
    for number, (module, rank) in enumerate(ranks.items()):
        names = [name.format(module) for name in SPELLINGS[spelling].split()]
        state |= zip(names, (f.to(dtype) for f in factors(module, rank, seed + 10 * number)), strict=True)
        if alpha is not None:
            state[f"lora_unet_{module}.alpha"] = torch.tensor(alpha)
    return state


def dense(state: dict, scales=None, config=None, header=None) -> dict[str, torch.Tensor]:
    """Module -> scale * up @ down as a weight in double precision, the definition of an adapter."""
    found = {}
    for module, pair in read_adapter("adapter", state, config, header).pairs.items():
        scale = pair.scale if scales is None else scales
        product = scale * pair.up.double().flatten(1) @ pair.down.double().flatten(1)
        found[module] = product.reshape(pair.up.shape[0], *pair.down.shape[1:])
    return found


def networks(*adapters: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """theta_0 with each adapter's products added."""
    names = sorted({name for adapter in adapters for name in adapter})
    shape = {name: next(adapter[name].shape for adapter in adapters if name in adapter) for name in names}
    theta = {name: random(100 + number, *shape[name]).double() for number, name in enumerate(names)}
    return [theta] + [{n: theta[n] + adapter.get(n, 0) for n in names} for adapter in adapters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reversed_adapter_is_the_dense_merge(spelling, dtype):
    alpha = 3.0 if spelling == "kohya" else None
    state = adapter_state(spelling, {"q": 2, "conv": 4}, 1, alpha, dtype)
    theta_base, theta_syn = networks(dense(state))
    for w in (1.5, 0.3, -1.0):
        merged = reverse_lora(state, w)
        assert list(merged) == list(state)
        theta_neon = networks(dense(merged))[1]
        assert_close(theta_neon, neon_merge(theta_base, theta_syn, w), rtol=0, atol=1e-6)


def test_reversed_adapter_keeps_its_alpha_positive_and_its_down_factors():
    state = adapter_state("kohya", {"q": 2}, 1, alpha=1.0)
    merged = reverse_lora(state, 1.5)
    assert merged["lora_unet_q.alpha"] == 1.0
    assert torch.equal(merged["lora_unet_q.lora_down.weight"], state["lora_unet_q.lora_down.weight"])
    assert torch.equal(merged["lora_unet_q.lora_up.weight"], -1.5 * state["lora_unet_q.lora_up.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w", [1.5, 0.4, 0.0, -1.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_two_adapters_of_different_rank_merge_by_their_products(spelling, w, dtype):
    alphas = (1.0, 6.0) if spelling == "kohya" else (None, None)
    base = adapter_state(spelling, {"q": 2, "conv": 3}, 1, alphas[0], dtype)
    syn = adapter_state(spelling, {"q": 4, "conv": 1}, 7, alphas[1], dtype)
    merged, rank = merge_lora(read_adapter("a", base), read_adapter("b", syn), w)
    _, theta_base, theta_syn, theta_neon = networks(dense(base), dense(syn), dense(merged))
    assert_close(theta_neon, neon_merge(theta_base, theta_syn, w), rtol=0, atol=2e-6)
    assert rank == {0.0: 3, -1.0: 4}.get(w, 6)  # concatenated, all modules alike
    assert {pair.down.shape[0] for pair in read_adapter("c", merged).pairs.values()} == {rank}


def test_merging_the_factors_would_be_wrong():
    base, syn = (adapter_state("peft", {"q": 2}, seed) for seed in (1, 7))
    theta_base, theta_syn, wrong = networks(dense(base), dense(syn), dense(neon_merge(base, syn, 1.5)))[1:]
    right = neon_merge(theta_base, theta_syn, 1.5)
    assert max((wrong[name] - right[name]).abs().max() for name in right) > 0.1


def test_module_of_one_side_only_counts_as_zero_in_the_other():
    base, syn = adapter_state("peft", {"q": 2, "conv": 2}, 1), adapter_state("peft", {"q": 2}, 7)
    merged, _ = merge_lora(read_adapter("a", base), read_adapter("b", syn), 1.5)
    _, theta_base, theta_syn, theta_neon = networks(dense(base), dense(syn), dense(merged))
    assert_close(theta_neon, neon_merge(theta_base, theta_syn, 1.5), rtol=0, atol=2e-6)


def test_whole_tensors_saved_with_two_adapters_are_merged_as_such():
    base, syn = (adapter_state("peft", {"q": 2}, seed) | {"head.weight": random(seed, 3, 3)} for seed in (1, 7))
    merged, _ = merge_lora(read_adapter("a", base), read_adapter("b", syn), 1.5)
    expected = neon_merge({"h": base["head.weight"]}, {"h": syn["head.weight"]}, 1.5)["h"]
    assert torch.equal(merged["head.weight"], expected)
    with pytest.raises(UserError, match=r"head\.weight is a whole tensor, whose value in the base"):
        reverse_lora(syn, 1.5)


def test_two_factors_of_one_module_stay_apart():
    names = ["double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.qkv_lora2"]
    state = {f"{name}.{end}.weight": random(len(name + end), 4, 4) for name in names for end in ("down", "up")}
    assert list(read_adapter("a", state).pairs) == names


@pytest.mark.parametrize("spelling", ["loralib", "torchtune", "parametrization"])
def test_where_only_code_knows_the_scale_it_must_be_given(tmp_path, spelling):
    states = [adapter_state(spelling, {"q": 2}, seed) for seed in (1, 7)]
    for name, state in zip("ab", states, strict=True):
        save_file(state, tmp_path / name)
    arguments = [tmp_path / "a", tmp_path / "b", "-w", "1.5", "-o", tmp_path / "out"]
    code, output = command(*arguments)
    assert code == 2 and "a: states no alpha" in output and "give --scale" in output
    assert command(*arguments, "--scale", "0.5")[0] == 0
    theta_base, theta_syn = networks(*(dense(state, scales=0.5) for state in states))[1:]
    theta_neon = networks(dense(states[0], 0.5), dense(states[1], 0.5), dense(load_file(tmp_path / "out")))[3]
    assert_close(theta_neon, neon_merge(theta_base, theta_syn, 1.5), rtol=0, atol=2e-6)
    assert command("--lora", tmp_path / "b", "-w", "1.5", "-o", tmp_path / "alone")[0] == 0  # whatever it is
    save_file(adapter_state("kohya", {"q": 2}, 1, 3.0), tmp_path / "kohya")
    code, output = command(tmp_path / "kohya", tmp_path / "kohya", "--scale", "1", "-w", "1", "-o", tmp_path / "out")
    assert code == 2 and "states its alpha" in output


def test_differences_of_whole_tensors_beside_the_factors_count_from_zero():
    states = [adapter_state("kohya", {"q": 2}, seed, 2.0) | {"n.diff": random(seed, 4)} for seed in (1, 7)]
    merged, _ = merge_lora(*(read_adapter(name, state) for name, state in zip("ab", states, strict=True)), 1.5)
    assert_close(merged["n.diff"], 2.5 * states[0]["n.diff"] - 1.5 * states[1]["n.diff"])
    assert_close(reverse_lora(states[1], 1.5)["n.diff"], -1.5 * states[1]["n.diff"])


UNKNOWN = [
    "lora_unet_q.oft_blocks", "lora_unet_q.oft_diag", "q.boft_R", "q.vera_lambda_b", "q.ia3_l", "q.hada_w1_a",
    "q.lokr_w1", "q.dora_scale", "q.lora_magnitude_vector", "q.lora_mid.weight", "base_model.model.q.new_kind",
    "layers.0.attn.lora_a", "q.loraA.weight", "q.lora.0.weight", "q.LoRA_up.0", "q_lora.weight", "prompt_embeddings",
    "q.lora_E", "q.lora_B.bias", "unet.q.lora_A1.weight", "layer.0.adapters.a.adapter_down.0.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_whatever_else_looks_like_an_adapter_is_refused(tmp_path, name):
    for side, value in (("a", 1.0), ("b", 2.0)):
        save_file({name: torch.full((4, 4), value), "head.bias": torch.zeros(1)}, tmp_path / side)
    arguments = [tmp_path / "a", tmp_path / "b", "-w", "1", "-o", tmp_path / "out"]
    code, output = command(*arguments)
    assert code == 2 and name in output and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="looks like an adapter"):
        merge_files(tmp_path / "a", tmp_path / "b", 1.0, tmp_path / "out")
    assert command(*arguments, "--dense")[0] == 0  # a network may call its own weights so
    assert load_file(tmp_path / "out")[name][0, 0] == 0


def test_four_factors_of_glora_are_refused(tmp_path):
    for side in "ab":
        save_file({f"q.{end}.weight": random(1, 3, 3) for end in ("a1", "a2", "b1", "b2")}, tmp_path / side)
    code, output = command(tmp_path / "a", tmp_path / "b", "-w", "1", "-o", tmp_path / "out")
    assert code == 2 and "q.a1.weight makes it more than a plain LoRA" in output
    assert not is_adapter({"block.a1.weight", "block.a2.weight"})


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor([1.0, 2.0]), r"alpha is \[2\] numbers, not one finite number"),
        (torch.tensor(torch.nan), "alpha is nan, not one finite number"),
        (torch.tensor(torch.inf), "alpha is inf, not one finite number"),
        (torch.tensor([]), r"alpha is \[0\] numbers"),
    ],
)
def test_alpha_is_one_finite_number(alpha, message):
    state = adapter_state("kohya", {"q": 2}, 1) | {"lora_unet_q.alpha": alpha}
    for read in (lambda: read_adapter("a", state), lambda: reverse_lora(state, 1.0)):
        with pytest.raises(UserError, match=message):
            read()
    state["lora_unet_q.alpha"] = torch.tensor([2.0])  # one number, in whatever shape
    assert read_adapter("a", state).pairs["lora_unet_q"].scale == 1.0


def test_rank_zero_and_factors_without_fractions_are_refused():
    state = {"q.lora_A.weight": torch.zeros(0, 5), "q.lora_B.weight": torch.zeros(6, 0)}
    with pytest.raises(UserError, match=r"q\.lora_A\.weight has the rank 0"):
        read_adapter("a", state)
    with pytest.raises(UserError, match=r"of the type torch\.int8"):
        read_adapter("a", {name: torch.ones(4, 4, dtype=torch.int8) for name in state})
    transposed = {"q.lora_A": torch.zeros(64, 4), "q.lora_B": torch.zeros(4, 64)}
    with pytest.raises(UserError, match="is transposed"):
        read_adapter("a", transposed)


def test_scales_of_peft_settings():
    state = adapter_state("peft", {"q": 4, "conv": 4}, 1)
    for config, scales in (
        ({"lora_alpha": 8, "r": 4}, (2, 2)),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, (4, 4)),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"q": 2}}, (0.5, 2)),
    ):
        pairs = read_adapter("a", state, config).pairs
        assert tuple(pairs[f"base_model.model.{module}"].scale for module in ("q", "conv")) == scales
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 12})}
    assert read_adapter("a", adapter_state("diffusers", {"q": 4}, 1), None, header).pairs["unet.q"].scale == 3


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"x.lora_magnitude_vector": torch.ones(1)}, None, "more than a plain LoRA"),
        ({"x.hada_w1_a": torch.ones(1)}, None, "more than a plain LoRA"),
        ({"base_model.model.q.lora_B.bias": torch.ones(1)}, None, "more than a plain LoRA"),
        ({"base_model.model.v.lora_A.weight": torch.ones(2, 3)}, None, r"v\.lora_B\.weight is missing"),
        ({"base_model.model.v.lora_B.weight": torch.ones(2, 3)}, None, "has no other factor"),
        ({"base_model.model.q.lora_A.weight": torch.ones(3, 5)}, None, "not of one rank"),
        ({"base_model.model.q.lora_A.weight": torch.full((2, 5), torch.nan)}, None, "not finite"),
        ({}, {"peft_type": "LOHA"}, "no plain LoRA"),
        ({}, {"use_dora": True}, "no plain LoRA"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "also moves the frozen weights"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(change, config, message):
    with pytest.raises(UserError, match=message):
        read_adapter("a", adapter_state("peft", {"q": 2}, 1) | change, config)


def test_adapters_of_two_networks_are_refused():
    peft, kohya = adapter_state("peft", {"q": 2}, 1), adapter_state("kohya", {"q": 2}, 1)
    with pytest.raises(UserError, match="adapt no module in common"):
        merge_lora(read_adapter("a", peft), read_adapter("b", kohya), 1.0)
    other = {name: value[..., :3] if "lora_A" in name else value for name, value in peft.items()}
    with pytest.raises(UserError, match="another shape in the two adapters"):
        merge_lora(read_adapter("a", peft), read_adapter("b", other), 1.0)
    assert is_adapter(kohya) and not is_adapter({"floral.weight", "flora.weight", "explora.0.bias"})


# Files and the command


def command(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(merge_command, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output and not isinstance(result.exception, AssertionError), result.exception
    return result.exit_code, result.output


def test_command_reverses_a_file(tmp_path):
    state = adapter_state("kohya", {"q": 2}, 1, 1.0, torch.bfloat16)
    save_file(state, tmp_path / "syn.safetensors", {"format": "pt", "ss_network_dim": "2"})
    code, output = command("--lora", tmp_path / "syn.safetensors", "-w", "1.5", "-o", tmp_path / "out.safetensors")
    assert code == 0 and "w=1.5" in output
    assert_close(load_file(tmp_path / "out.safetensors"), reverse_lora(state, 1.5), rtol=0, atol=0)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and json.loads(file.metadata()["neon"])["w"] == 1.5


def test_blocks_of_a_reversed_adapter_have_their_w_or_are_left_out_and_the_header_says_so(tmp_path):
    names = [f"unet.{block}.attn.{layer}.lora_{end}.weight" for block in ("up_blocks.0", "mid_block")
             for layer in ("to_q", "to_k") for end in "AB"]  # fmt: skip
    state = {name: random(number, *((2, 5) if "_A" in name else (6, 2))) for number, name in enumerate(names)}
    save_file(state, tmp_path / "syn.safetensors", {"format": "pt"})
    steps = ["-w", "1.0", "--w", "up_blocks.*=0.5", "--exclude", "*.to_k", "-o", tmp_path / "out.safetensors"]
    assert command("--lora", tmp_path / "syn.safetensors", *steps)[0] == 0
    expected, found = dense(state), dense(load_file(tmp_path / "out.safetensors"))
    for module, change in expected.items():
        w = 0 if module.endswith("to_k") else 0.5 if "up_blocks" in module else 1.0
        assert_close(found.get(module, torch.zeros_like(change)), -w * change, rtol=0, atol=1e-6)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        record = json.loads(file.metadata()["neon"])
    assert (record["w"], record["w_by_pattern"], record["keep"]) == (1.0, [["up_blocks.*", 0.5]], ["*.to_k"])
    steps[5] = "*norm*"
    code, output = command("--lora", tmp_path / "syn.safetensors", *steps[:-1], tmp_path / "other.safetensors")
    assert code == 2 and "--keep *norm*: fits no tensor" in output and not (tmp_path / "other.safetensors").exists()


def test_command_merges_two_files_that_are_adapters(tmp_path):
    states = [adapter_state("kohya", {"q": rank}, rank, 1.0) for rank in (2, 3)]
    for name, state in zip("ab", states, strict=True):
        save_file(state, tmp_path / name, {"ss_network_dim": "2", "ss_network_alpha": "1.0"})
    assert command(tmp_path / "a", tmp_path / "b", "-w", "2", "-o", tmp_path / "out")[0] == 0
    merged = load_file(tmp_path / "out")
    theta_base, theta_syn, theta_neon = networks(*map(dense, (*states, merged)))[1:]
    assert_close(theta_neon, neon_merge(theta_base, theta_syn, 2.0), rtol=0, atol=2e-6)
    with safe_open(tmp_path / "out", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("5", "5.0")


def peft_folder(folder, state: dict, **config):
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], **config}), encoding="utf-8")
    (folder / "README.md").write_text("card", encoding="utf-8")
    return folder


def test_peft_folders_get_settings_that_fit_the_concatenated_rank(tmp_path):
    states = adapter_state("peft", {"q": 2}, 1), adapter_state("peft", {"q": 4, "conv": 2}, 7)
    base = peft_folder(tmp_path / "base", states[0], r=2, lora_alpha=8, rank_pattern={"q": 2})
    syn = peft_folder(tmp_path / "syn", states[1], r=4, lora_alpha=4, use_rslora=True)
    assert command(base, syn, "-w", "0.7", "-o", tmp_path / "out")[0] == 0
    config = json.loads((tmp_path / "out" / CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    assert (
        config["target_modules"] == ["conv", "q"] and (tmp_path / "out/README.md").read_text(encoding="utf-8") == "card"
    )
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in (base, syn)]
    products = [dense(state, config=one) for state, one in zip(states, configs, strict=True)]
    theta_base, theta_syn, theta_neon = networks(*products, dense(merged, config=config))[1:]
    assert_close(theta_neon, neon_merge(theta_base, theta_syn, 0.7), rtol=0, atol=2e-6)


def test_peft_folder_is_reversed_with_its_settings_unchanged(tmp_path):
    state = adapter_state("peft", {"q": 2}, 1)
    syn = peft_folder(tmp_path / "syn", state, r=2, lora_alpha=8)
    assert command("--lora", syn, "-w", "1.2", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / CONFIG).read_bytes() == (syn / CONFIG).read_bytes()
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    assert_close(dense(merged), {name: -1.2 * product for name, product in dense(state).items()}, rtol=0, atol=1e-6)


def test_wrong_use_is_told(tmp_path):
    folder = peft_folder(tmp_path / "syn", adapter_state("peft", {"q": 2}, 1), r=2, lora_alpha=8)
    adapter, plain, out = folder / "adapter_model.safetensors", tmp_path / "plain", tmp_path / "out"
    save_file({"q.weight": torch.ones(2)}, plain)
    for arguments, message in (
        (["--lora", plain], "holds no LoRA factors"),
        (["--lora", tmp_path / "none"], "does not exist"),
        (["--lora", adapter, plain, plain], "takes the place of BASE and SYN"),
        ([adapter, adapter], "give the two folders"),
        ([plain, adapter], "is no adapter"),
        ([adapter, adapter, "--rule", "official-edm"], "only for two checkpoint files"),
        ([plain], "BASE and SYN are needed"),
        (["--lora", folder, "-w", "nan"], "must be a finite number"),
        (["--lora", folder, "-w", "1e39"], "beyond the range of torch.float32"),
    ):
        code, output = command(*(["-w", "1"] if "-w" not in arguments else []), *arguments, "-o", out)
        assert code == 2 and message in output, output
        assert not out.exists()
