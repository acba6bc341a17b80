"""Adapters as peft and diffusers write them: the merged one makes the network that a dense merge would."""

import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from neon_core.merge import neon_merge
from neon_files.errors import UserError
from neon_run.merging.command import merge_paths
from neon_run.merging.folders import merge_folders, reverse_adapter
from neon_run.merging.steps import Steps
from neon_run.merging.weight_file import ADAPTER_CONFIG

W = (1.5, 0.4, 0.0, -1.0)
pytestmark = pytest.mark.filterwarnings("ignore")
peft = None


@pytest.fixture(scope="module", autouse=True)
def import_peft():
    """Not where tests are collected, which every worker does: it takes seconds."""
    global peft
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.conv = nn.Linear(64, 64), nn.Linear(64, 128), nn.Conv2d(4, 6, 3)
        self.embed, self.head = nn.Embedding(5, 64), nn.Linear(64, 2)
        self.config = {"model_type": "none"}
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)


def adapter(folder: Path, config, seed: int) -> Path:
    """A trained adapter of Net as peft saves it."""
    torch.manual_seed(0)  # what the kind itself draws, and does not train, is alike
    model = peft.get_peft_model(Net(), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def network(folder: Path) -> dict[str, torch.Tensor]:
    """Net with the adapter merged into its weights, by peft."""
    model = peft.PeftModel.from_pretrained(Net(), folder)
    return {name: value.detach() for name, value in model.merge_and_unload().state_dict().items()}


LINEAR = {
    "IA3": lambda: peft.IA3Config(target_modules=["q", "v", "conv"], feedforward_modules=["v"]),
    "MiSS": lambda: peft.MissConfig(target_modules=["q", "v"], r=8),
    "MiSS bat": lambda: peft.MissConfig(target_modules=["q", "v"], r=8, init_weights="bat"),
    "MiSS mini": lambda: peft.MissConfig(target_modules=["q", "v"], r=8, init_weights="mini", mini_r=16),
    "SHiRA": lambda: peft.ShiraConfig(target_modules=["q", "v"], r=2, random_seed=3),
    "C3A": lambda: peft.C3AConfig(target_modules=["q", "v"], block_size=16),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=["q", "v"], n_frequency=20, scaling=30.0),
}
LORA = {
    "plain": lambda **more: peft.LoraConfig(target_modules=["q", "v", "conv", "embed"], **{"r": 4, **more}),
    "patterns": lambda **more: peft.LoraConfig(
        target_modules=["q", "v"], rank_pattern={"q": 2}, alpha_pattern={"v": 3}, use_rslora=True, **more
    ),
    "head": lambda **more: peft.LoraConfig(target_modules=["q", "v"], modules_to_save=["head"], **more),
    "bias": lambda **more: peft.LoraConfig(target_modules=["q", "v"], bias="lora_only", **more),
    "orthogonal": lambda **more: peft.LoraConfig(target_modules=["q"], init_lora_weights="orthogonal", **more),
}


@pytest.mark.parametrize("kind", [*LINEAR, *LORA])
def test_two_adapters_merge_as_the_networks_that_they_make(tmp_path, kind):
    if kind in LORA:
        configs = LORA[kind](lora_alpha=6), LORA[kind](lora_alpha=3, r=6)
    else:
        configs = LINEAR[kind](), LINEAR[kind]()
    ends = [adapter(tmp_path / str(seed), config, seed) for seed, config in enumerate(configs, 1)]
    dense = [network(folder) for folder in ends]
    for w in W:
        out = merge_folders(*ends, w, tmp_path / f"out{w}")
        assert_close(network(out), neon_merge(*dense, w), rtol=0, atol=1e-6)
    assert not torch.equal(dense[0]["q.weight"], dense[1]["q.weight"])


@pytest.mark.parametrize("kind", [*LINEAR, "plain", "patterns"])
def test_one_adapter_is_reversed_as_the_network_that_it_makes(tmp_path, kind):
    syn = adapter(tmp_path / "syn", (LINEAR | LORA)[kind](), 1)
    base, dense = Net().state_dict(), network(syn)
    for w in W:
        out = reverse_adapter(syn, w, tmp_path / f"out{w}")
        assert_close(network(out), neon_merge(base, dense, w), rtol=0, atol=1e-6)


def test_adapters_of_different_modules_count_as_zero_where_they_are_not(tmp_path):
    ends = [
        adapter(tmp_path / "a", peft.LoraConfig(target_modules=["q", "embed"], r=4, lora_alpha=3), 1),
        adapter(tmp_path / "b", peft.LoraConfig(target_modules="(q|v|conv)", r=2, rank_pattern={"v": 3}), 2),
    ]
    dense = [network(folder) for folder in ends]
    for number, pair in enumerate((ends, ends[::-1])):
        out = merge_folders(*pair, 1.5, tmp_path / f"out{number}")
        expected = neon_merge(*(dense if pair is ends else dense[::-1]), 1.5)
        assert_close(network(out), expected, rtol=0, atol=1e-6)


def test_w_by_pattern_and_kept_modules(tmp_path):
    """`-w 1 --w 'q*=0.5' --keep v` of two adapters is the dense merge with these steps."""
    for kind in (LORA["plain"], LINEAR["MiSS"]):
        ends = [adapter(tmp_path / str(seed), kind(), seed) for seed in (1, 2)]
        dense = [network(folder) for folder in ends]
        steps = Steps(1.0, blocks=(("q*", 0.5),), keep=("v*",))
        merged = network(merge_folders(*ends, steps, tmp_path / "out"))
        alone = network(reverse_adapter(ends[1], steps, tmp_path / "alone"))
        for name, w in (("q.weight", 0.5), ("v.weight", 0.0), ("conv.weight", 1.0)):
            at_w = [neon_merge(base, dense[1], w)[name] for base in (dense[0], Net().state_dict())]
            assert_close([merged[name], alone[name]], at_w, rtol=0, atol=1e-6)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)


OTHERS = {
    "ADALORA": ("AdaLoraConfig", {"total_step": 10}),
    "VERA": ("VeraConfig", {}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 4, "vector_length": 8}),
    "HRA": ("HRAConfig", {}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "GLORA": ("GloraConfig", {}),
    "GRALORA": ("GraloraConfig", {}),
    "LOHA": ("LoHaConfig", {}),
    "LOKR": ("LoKrConfig", {}),
    "DELORA": ("DeloraConfig", {}),
    "HIRA": ("HiraConfig", {}),
    "LILY": ("LilyConfig", {}),
    "POLY": ("PolyConfig", {}),
    "ROAD": ("RoadConfig", {}),
    "PVERA": ("PveraConfig", {}),
    "TINYLORA": ("TinyLoraConfig", {}),
    "UNILORA": ("UniLoraConfig", {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name_with_settings_or_without(tmp_path, kind):
    name, more = OTHERS[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this version of peft has no {name}")
    config = getattr(peft, name)(target_modules=["q"], **more)
    ends = [adapter(tmp_path / str(seed), config, seed) for seed in (1, 2)]
    for merge in (lambda: merge_folders(*ends, 1.0, tmp_path / "out"), lambda: reverse_adapter(ends[0], 1.0, "out")):
        with pytest.raises(UserError, match=f"is of the kind {kind}; only LORA, IA3, .* merge the networks instead"):
            merge()
    for number, folder in enumerate(ends):
        state = load_file(folder / "adapter_model.safetensors")
        save_file(state, tmp_path / f"peft{number}.safetensors")  # alone, under another name
        bare = {name.removeprefix("base_model.model.").removeprefix("base_model."): v for name, v in state.items()}
        save_file(bare, tmp_path / f"bare{number}.safetensors")  # as libraries that inject adapters name them
    for name in ("peft", "bare"):
        with pytest.raises(UserError, match=r"no LoRA factors|more than a plain LoRA"):
            merge_paths(tmp_path / f"{name}0.safetensors", tmp_path / f"{name}1.safetensors", 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_setting_of_next_year": 2}, "a_setting_of_next_year = 2"),
        ({"init_lora_weights": "pissa"}, "began with pissa, which also moves"),
        ({"init_lora_weights": "lora_ga"}, "began with lora_ga, which also moves"),
        ({"peft_type": "NEXT"}, "is of the kind NEXT; only LORA"),
        ({"peft_type": None}, "has no peft_type"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is None in one's settings, True in the other's"),
        ({"lora_alpha": float("nan")}, "not one finite number"),
        ({"lora_alpha": [1, 2]}, "not one finite number"),
    ],
)
def test_settings_decide_by_an_allow_list(tmp_path, more, message):
    ends = [adapter(tmp_path / str(seed), LORA["plain"](), seed) for seed in (1, 2)]
    settings = json.loads((ends[1] / ADAPTER_CONFIG).read_text(encoding="utf-8")) | more
    (ends[1] / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        merge_folders(*ends, 1.0, tmp_path / "out")


def test_linear_kinds_whose_numbers_mean_different_things_are_refused(tmp_path):
    def shira(seed):
        return peft.ShiraConfig(target_modules=["q"], r=2, random_seed=seed)

    def fourier(seed):
        return peft.FourierFTConfig(target_modules=["q"], n_frequency=20, random_loc_seed=seed)

    for kind, message in ((shira, "shira_indices: differs between"), (fourier, "random_loc_seed is 3 in one's")):
        ends = [adapter(tmp_path / f"{message}{seed}", kind(seed), seed) for seed in (3, 4)]
        with pytest.raises(UserError, match=message):
            merge_folders(*ends, 1.0, tmp_path / "out")
    lora = adapter(tmp_path / "lora", LORA["plain"](), 1)
    with pytest.raises(UserError, match="only two of one kind are merged"):
        merge_folders(lora, ends[0], 1.0, tmp_path / "out")


def test_adapters_in_16_bits_and_in_torch_files(tmp_path):
    ends = [adapter(tmp_path / str(seed), LORA["plain"](), seed) for seed in (1, 2)]
    for folder in ends:
        state = {k: v.bfloat16() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        torch.save(state, folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    out = merge_folders(*ends, 1.5, tmp_path / "out")
    assert_close(network(out), neon_merge(*map(network, ends), 1.5), rtol=0, atol=2e-6)


# diffusers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def tiny_unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip


def unet_network(diffusers, file: Path) -> dict[str, torch.Tensor]:
    unet = tiny_unet(diffusers)
    unet.load_lora_adapter(file.parent, weight_name=file.name, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


@pytest.mark.parametrize("metadata", [True, False])
def test_diffusers_pipelines_load_the_merged_adapter(tmp_path, diffusers, metadata):
    ends = []
    for seed, rank in ((1, 2), (2, 4)):
        unet = tiny_unet(diffusers)
        unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=3 if metadata else rank, target_modules=["to_q", "to_v"]))
        generator = torch.Generator().manual_seed(seed)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / str(seed)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=peft.get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() if metadata else None,
        )
        ends.append(next(folder.glob("*.safetensors")))
    dense = [unet_network(diffusers, file) for file in ends]
    base = tiny_unet(diffusers).state_dict()
    for w in (1.5, -1.0):
        merge_paths(*ends, w, tmp_path / "out.safetensors")
        assert_close(unet_network(diffusers, tmp_path / "out.safetensors"), neon_merge(*dense, w), rtol=0, atol=1e-6)
        reverse_adapter(ends[1], w, tmp_path / "alone.safetensors")
        expected = neon_merge(base, dense[1], w)
        assert_close(unet_network(diffusers, tmp_path / "alone.safetensors"), expected, rtol=0, atol=1e-6)
    assert max((dense[0][name] - dense[1][name]).abs().max() for name in base) > 0.01


def ddpm(diffusers, folder: Path, seed: int) -> Path:
    """A pipeline as a hub holds it: also in half precision."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=20))
    pipeline.save_pretrained(folder)
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def test_a_merged_pipeline_opens_with_all_its_variants(tmp_path, diffusers):
    base, syn = (ddpm(diffusers, tmp_path / str(seed), seed) for seed in (1, 2))
    (syn / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # a trainer saves one
    out = merge_folders(base, syn, 1.5, tmp_path / "out")
    load = diffusers.DDPMPipeline.from_pretrained
    expected = neon_merge(load(base).unet.state_dict(), load(syn).unet.state_dict(), 1.5)
    assert_close(load(out).unet.state_dict(), expected, rtol=0, atol=0)
    half = load(out, variant="fp16", torch_dtype=torch.float16).unet.state_dict()
    assert_close(half, {name: value.half() for name, value in expected.items()}, rtol=0, atol=0)


def kohya(module: str, end: int) -> str:
    return f"lora_unet_{module.replace('.', '_')}.lora_{('down', 'up')[end]}.weight"


def processor(module: str, end: int) -> str:
    place, _, layer = module.rpartition(".")
    return f"unet.{place}.processor.{layer}_lora.{('down', 'up')[end]}.weight"


SPELLINGS = {
    "kohya": kohya,
    "attention processor": processor,
    "layers": lambda module, end: f"unet.{module}.lora.{('down', 'up')[end]}.weight",
    "peft": lambda module, end: f"unet.{module}.lora_{'AB'[end]}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapters_of_every_spelling_that_diffusers_reads(tmp_path, diffusers, spelling):
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    modules = [name for name, _ in tiny_unet(diffusers).named_modules() if name.endswith(("to_q", "to_v"))]

    def write(file: Path, seed: int, rank: int, alpha: float) -> Path:
        unet, state = tiny_unet(diffusers), {}
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            layer = unet.get_submodule(module)
            state[SPELLINGS[spelling](module, 0)] = 0.3 * torch.randn(rank, layer.in_features, generator=generator)
            state[SPELLINGS[spelling](module, 1)] = 0.3 * torch.randn(layer.out_features, rank, generator=generator)
            if spelling == "kohya":
                state[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(alpha)
        save_file(state, file)
        return file

    def dense(file: Path) -> dict[str, torch.Tensor]:
        unet = tiny_unet(diffusers)
        state, alphas = mixin.lora_state_dict(str(file), unet_config=unet.config)[:2]
        mixin.load_lora_into_unet(state, alphas, unet)
        unet.fuse_lora()
        unet.unload_lora()
        return {name: value.detach() for name, value in unet.state_dict().items()}

    ends = write(tmp_path / "a.safetensors", 1, 2, 1.0), write(tmp_path / "b.safetensors", 2, 3, 6.0)
    networks, out = [dense(file) for file in ends], tmp_path / "out.safetensors"
    base = tiny_unet(diffusers).state_dict()
    assert max((networks[0][name] - networks[1][name]).abs().max() for name in base) > 0.01
    for w in (1.5, -1.0):
        merge_paths(*ends, w, out)
        assert_close(dense(out), neon_merge(*networks, w), rtol=0, atol=1e-6)
        reverse_adapter(ends[1], w, out)
        assert_close(dense(out), neon_merge(base, networks[1], w), rtol=0, atol=1e-6)
