"""Neon for LoRA adapters: the merge acts on the change of a weight, scale * up @ down, not on the factors.

Names of factors are an allow-list (`_SPELLINGS`); any other adapter is refused. Linear layers,
embeddings and convolutions. A sum of products is exact as an adapter of concatenated rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neon_core.merge import neon_rule
from neon_files.checkpoint import is_finite
from neon_files.errors import UserError
from neon_run.merging.steps import Steps, as_steps

# Names of the factors: (part of down, part of up, pattern behind it). All follow the module's name.
_SPELLINGS = (
    ("lora_A", "lora_B", r"(?:\.[^.]+)?\.weight"),  # peft; diffusers' present one
    ("lora_embedding_A", "lora_embedding_B", r"(?:\.[^.]+)?"),  # peft
    ("lora_down", "lora_up", r"(?:\.[^.]+)?\.weight"),  # kohya
    ("lora.down", "lora.up", r"(?:\.[^.]+)?\.weight"),  # diffusers: attention processors
    ("lora_linear_layer.down", "lora_linear_layer.up", r"\.weight"),  # diffusers: text encoders
    ("lora1.down", "lora1.up", r"\.weight"),  # XLabs: image stream
    ("lora2.down", "lora2.up", r"\.weight"),  # XLabs: text stream
    ("lora_a", "lora_b", r"\.weight"),  # torchtune
    (".lora_A", ".lora_B", ""),  # loralib, and parametrizations
)
# Spellings without a common loader: where the file states no scale, none is defined.
_SCALE_IN_CODE = re.compile(r"lora_A$|lora_a\.weight$")
_WORD = r"(?:(?<=[._])|^|(?=\.))"  # `randlora_A` is another kind
_DOWN = [(re.compile(rf"{_WORD}{re.escape(down)}({after})$"), up) for down, up, after in _SPELLINGS]
_UP = re.compile("|".join(rf"{_WORD}{re.escape(up)}{after}$" for _, up, after in _SPELLINGS))
# Names by which adapters of any kind are recognised. `base_model.model.` is how peft begins all of them.
_MARKS = re.compile(
    r"^base_model\.model\.|^prompt_embeddings$|(?:^|[._/-])(?:[lL]o[rR][aA]|loha|lokr|locon|lycoris|hada|dora|glora|"
    r"gralora|adalora|vblora|randlora|delora|tinylora|unilora|oft|boft|hra|ia3|vera|pvera|c3a|shira|hira|fourierft|"
    r"waveft|psoft|road_theta|road_alpha|miss_block|bone_block|adamss|beft|deft|lily_[AB]|peanut|frod|osf_svd_params|"
    r"supertuning|trainable_tokens_delta|ln_tuning_layers|poly_lora|poly_router|adapter_down|adapter_up)(?=[._\dA-Z]|$)"
)
# Changes of whole tensors that some trainers keep beside the factors.
_DIFFERENCE = re.compile(r"\.diff(_b)?$")
# Starts that leave the frozen weights as they are; others move them, and then the bare network is not theta_base.
_STARTS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
# Settings of peft under which the effect is scale * up @ down. Any other one must be off.
_SETTINGS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out", "bias",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights", "eva_config", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size",
}  # fmt: skip
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # entry of a safetensors header


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a state dict with these names looks like an adapter, of a kind that we can merge or not."""
    names = set(names)
    return any(_factor(name) or _MARKS.search(name) for name in names) or _four_of_glora(names) is not None


def _factor(name: str) -> tuple[str, str] | None:
    """(module, name of the other factor) where `name` is a `down` factor."""
    for pattern, up in _DOWN:
        match = pattern.search(name)
        if match:
            module, which = name[: match.start()], re.match(r"lora\d", up)
            return f"{module}{which[0]}" if which else module.rstrip("._"), f"{module}{up}{match[1]}"
    return None


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that an adapter's factors are of, as patterns may name them."""
    return [factor[0] for factor in map(_factor, names) if factor]


def _four_of_glora(names: set[str]) -> str | None:
    """GLoRA's factors a1, a2, b1, b2, which only together identify it."""
    ends = (name for name in names if name.endswith("a1.weight"))
    others = ("a2", "b1", "b2")
    return next((n for n in ends if all(f"{n.removesuffix('a1.weight')}{o}.weight" in names for o in others)), None)


@dataclass(frozen=True)
class Pair:
    """The change of one module by an adapter: scale * up @ down is added."""

    down: Tensor  # [r, in, ...]
    up: Tensor  # [out, r, ...]
    scale: float
    names: tuple[str, str]  # of down and up in the file


@dataclass(frozen=True)
class Adapter:
    """The pairs by module; `rest` are whole tensors saved with the adapter (heads, for example)."""

    name: str  # the file, for messages
    pairs: dict[str, Pair]
    rest: dict[str, Tensor] = field(default_factory=dict)
    has_alphas: bool = False  # kohya's, one number per module
    scales_known: bool = False  # false: no alpha is stated, which loaders then take as equal to the rank
    scale_in_code: bool = False  # of spellings that have no common loader

    @property
    def rank(self) -> int:
        return max(pair.down.shape[0] for pair in self.pairs.values())


def read_adapter(
    name: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
    scale: float | None = None,
) -> Adapter:
    """The pairs in `state`, with the scale that loaders give them: alpha / r from kohya's alphas, from `config` (peft's
    adapter_config.json) or from the safetensors `header` (diffusers), else `scale`, else 1.

    Raises UserError for adapters of another kind, and for factors that do not fit each other.
    """
    configs = _configs(name, config, header or {})
    pairs: dict[str, Pair] = {}
    rest, alphas, all_scaled = dict(state), 0, True
    for key in state:
        module, up_key = _factor(key) or (None, "")
        if module is None:
            continue
        if up_key not in state:
            raise UserError(f"{name}: {up_key} is missing, the other factor of {key}")
        down, up, alpha = rest.pop(key), rest.pop(up_key), rest.pop(f"{module}.alpha", None)
        if module in pairs:
            raise UserError(f"{name}: {key} and {pairs[module].names[0]} adapt one module; merge the network it gives")
        _check_pair(name, key, down, up_key, up)
        pair_scale = _scale(module, down.shape[0], configs) if alpha is None else None
        if alpha is not None:
            alphas, pair_scale = alphas + 1, _number(alpha, f"{name}: {module}.alpha") / down.shape[0]
        all_scaled &= pair_scale is not None
        pairs[module] = Pair(
            down, up, pair_scale if pair_scale is not None else 1.0 if scale is None else scale, (key, up_key)
        )
    _check_rest(name, rest)
    if not pairs:
        some = ", ".join(list(state)[:2])
        raise UserError(f"{name}: holds no LoRA factors of a known spelling ({some}, ...); merge the networks instead")
    if all_scaled and scale is not None:
        raise UserError(f"--scale {scale:g}: {name} states its alpha; leave the flag out")
    in_code = any(_SCALE_IN_CODE.search(pair.names[0]) for pair in pairs.values())
    return Adapter(name, pairs, rest, alphas > 0, all_scaled or scale is not None, in_code)


def _check_pair(name: str, down_key: str, down: Tensor, up_key: str, up: Tensor) -> None:
    if up.dim() < 2 or down.dim() < 2 or up.shape[1] != down.shape[0]:
        raise UserError(f"{name}: {down_key} {list(down.shape)} and {up_key} {list(up.shape)} are not of one rank")
    rank = down.shape[0]
    if rank == 0:
        raise UserError(f"{name}: {down_key} has the rank 0; take the pair out of the file, it changes nothing")
    if _SCALE_IN_CODE.search(down_key) and rank > max(up.shape[0], down[0].numel()):
        raise UserError(f"{name}: {down_key} {list(down.shape)} is transposed, [in, rank]; write it as [rank, in]")
    for key, tensor in ((down_key, down), (up_key, up)):
        if not tensor.is_floating_point():
            raise UserError(f"{name}: {key} is of the type {tensor.dtype}, not a factor in full precision")
        if not is_finite(tensor):
            raise UserError(f"{name}: {key} holds numbers that are not finite; the adapter is broken")


def _check_rest(name: str, rest: Mapping[str, Tensor]) -> None:
    """UserError for tensors of an adapter that are no factors; whole tensors of a network are allowed."""
    glora = _four_of_glora(set(rest))
    for key in sorted(rest, key=lambda key: key.endswith(".alpha")):
        if _UP.search(key):
            raise UserError(f"{name}: {key} has no other factor")
        marked = _MARKS.search(key.removeprefix("base_model.model."))
        if marked or key == glora or key.endswith(".alpha"):
            raise UserError(f"{name}: {key} makes it more than a plain LoRA; merge the network that it gives instead")


def _number(value: Any, name: str) -> float:
    """A scalar, of a file or of settings. UserError where it is a vector, not finite, or no number."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        kind = f"{list(value.shape)} numbers" if isinstance(value, Tensor) else repr(value)
        raise UserError(f"{name} is {kind}, not one finite number; the adapter is broken")
    return float(value)


def _configs(name: str, config: Mapping[str, Any] | None, header: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Prefix of modules -> peft's settings for them."""
    configs: dict[str, Any] = {}
    if config is not None:
        configs = {"base_model.model.": config, "": config}
    elif _DIFFUSERS_CONFIG in header:
        try:
            settings = json.loads(header[_DIFFUSERS_CONFIG]).items()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{name}: {_DIFFUSERS_CONFIG} in its header is no table ({error})") from error
        for key, value in settings:
            prefix, _, setting = key.rpartition(".")
            configs.setdefault(f"{prefix}." if prefix else "", {})[setting] = value
    for settings in configs.values():
        _check_settings(name, settings)
    return configs


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(
            f"{name}: its settings state {kind}, which is no plain LoRA; merge the network it gives instead"
        )
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        raise UserError(f"{name}: began with {start}, which also moves the frozen weights; convert it to plain LoRA")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise UserError(f"{name}: alpha_pattern is {patterns!r}, not a table; the settings are broken")
    for key in patterns:
        _pattern(name, key)
    for setting, value in settings.items():
        if value and setting not in _SETTINGS:
            raise UserError(
                f"{name}: its setting {setting} = {value} makes it no plain LoRA; merge the network it gives"
            )


def _scale(module: str, rank: int, configs: Mapping[str, Mapping[str, Any]]) -> float | None:
    for prefix, settings in configs.items():
        if module.startswith(prefix):
            patterns = (settings.get("alpha_pattern") or {}).items()
            inner = module.removeprefix(prefix)
            matching = (alpha for key, alpha in patterns if _pattern(module, key).fullmatch(inner))
            alpha = _number(next(matching, settings.get("lora_alpha", rank)), f"{module}: lora_alpha")
            return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return None


def _pattern(name: str, key: Any) -> re.Pattern:
    """A module's name, or its part behind a dot, as in peft's patterns."""
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})")
    except re.error as error:
        raise UserError(f"{name}: alpha_pattern has {key!r}, which is no regular expression ({error})") from error


def reverse_lora(
    state: Mapping[str, Tensor],
    w: float | Steps,
    name: str = "the adapter",
    config: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The adapter of theta_base - w (theta_syn - theta_base), where theta_syn is theta_base with the adapter `state`.

    It is the same adapter with -w times its `up` factors; names, ranks and alphas stay. (A negative alpha would say
    the same, but loaders that split it evenly between the factors cannot take one.) Half precision becomes float32,
    so that nothing is rounded. Raises UserError as `read_adapter`.
    """
    steps, adapter = as_steps(w), read_adapter(name, state, config, header)
    whole = next((key for key in adapter.rest if not _DIFFERENCE.search(key)), None)
    if whole:
        raise UserError(
            f"{name}: {whole} is a whole tensor, whose value in the base is not known; "
            "merge it with an adapter of the base, or the networks themselves"
        )
    merged = {key: wide(value) if value.is_floating_point() else value.clone() for key, value in state.items()}
    for module, pair in adapter.pairs.items():
        step = steps.of(module, pair.names[0])
        merged[pair.names[1]] = _finite(-step * wide(pair.up), pair.names[1], step)
    for key, value in adapter.rest.items():
        merged[key] = neon_rule(key, torch.zeros_like(merged[key]), wide(value), steps.of(key))
    return merged


def merge_lora(base: Adapter, syn: Adapter, w: float | Steps) -> tuple[dict[str, Tensor], int]:
    """(state, rank) of the adapter whose product is (1 + w) base - w syn in every module; its scale is 1.

    down = [A_base; A_syn], up = [(1 + w) s_base B_base, -w s_syn B_syn]. All modules get one rank, with zeros where
    there is less, since some loaders take alpha from it. A module that only one side adapts has the
    product 0 in the other. Names are the base's; `rest` is merged as any state dict.
    """
    steps = as_steps(w)
    if not base.pairs.keys() & syn.pairs.keys():
        one, other = next(iter(base.pairs)), next(iter(syn.pairs))
        raise UserError(f"{base.name} and {syn.name} adapt no module in common ({one}, {other}): not of one network?")
    rest = steps.merge(base.rest, syn.rest)
    products = {m: _concatenated(m, base.pairs.get(m), syn.pairs.get(m), steps) for m in base.pairs | syn.pairs}
    merged = {module: product for module, product in products.items() if product}
    rank = max(down.shape[0] for down, _ in merged.values())
    state: dict[str, Tensor] = {}
    for module, (down, up) in merged.items():
        names = (base.pairs.get(module) or syn.pairs[module]).names
        state[names[0]] = _padded(down, 0, rank)
        state[names[1]] = _finite(_padded(up, 1, rank), names[1], steps.of(module, names[0]))
        if base.has_alphas or syn.has_alphas:
            state[f"{module}.alpha"] = torch.tensor(float(rank))
    return state | rest, rank


def _concatenated(module: str, base: Pair | None, syn: Pair | None, steps: Steps) -> tuple[Tensor, Tensor] | None:
    """(down, up) of (1 + w) base - w syn, with scale 1; None where that is nothing."""
    w = steps.of(module, *(pair.names[0] for pair in (base, syn) if pair))
    parts = [(factor, pair) for factor, pair in ((1 + w, base), (-w, syn)) if pair and factor != 0]
    downs = [wide(pair.down) for _, pair in parts]
    ups = [factor * pair.scale * wide(pair.up) for factor, pair in parts]
    if len({down.shape[1:] for down in downs}) > 1 or len({(up.shape[0], *up.shape[2:]) for up in ups}) > 1:
        raise UserError(f"{module}: of another shape in the two adapters; they are not of one network")
    return (torch.cat(downs, 0), torch.cat(ups, 1)) if parts else None


def wide(tensor: Tensor) -> Tensor:
    """At least float32, in new memory."""
    exact = torch.float32 if tensor.element_size() == 1 else torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(exact, copy=True)


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim)


def _finite(factor: Tensor, name: str, w: float) -> Tensor:
    if not is_finite(factor):
        raise UserError(f"{name}: w = {w:g} leads beyond the range of {factor.dtype}; choose a smaller w")
    return factor


def merged_config(base: Mapping[str, Any], rank: int, modules: Iterable[str] | None = None) -> dict[str, Any]:
    """peft's settings for the result of `merge_lora`: rank r, scale 1. `modules`: those adapted, where the two differ.

    Modules are then named in full, since nothing shorter is sure to fit both lists.
    """
    settings = {**base, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if modules is not None:
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
        inner = sorted(module.removeprefix("base_model.model.") for module in modules)
        settings |= {name: None for name in narrowing if name in base} | {"target_modules": inner}
    return settings


def merged_header(header: Mapping[str, str], rank: int) -> dict[str, str]:
    """The base's safetensors header for the result of `merge_lora`, without the old rank."""
    ranks = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    kept = {name: text for name, text in header.items() if name != _DIFFUSERS_CONFIG}
    return kept | {name: text for name, text in ranks.items() if name in kept}
