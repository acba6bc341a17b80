"""Neon for LoRA adapters: the merge acts on what an adapter adds to a weight, scale * up @ down, not on its factors.

Read: the spellings of peft (`lora_A`/`lora_B`, embeddings too), diffusers (`lora.down`/`lora.up`) and kohya
(`lora_down`/`lora_up`, `alpha`), linear layers and convolutions. A product is exact as an adapter of concatenated rank.
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

from neon_core.merge import check_w, neon_merge
from neon_files.checkpoint import is_finite
from neon_files.errors import UserError

CONFIG = "adapter_config.json"
_UP_OF = {
    "lora_A": "lora_B",
    "lora_embedding_A": "lora_embedding_B",
    "lora_down": "lora_up",
    "lora.down": "lora.up",
}
_DOWN = re.compile(
    r"(lora_A|lora_embedding_A|lora_down|lora\.down)((?:\.[^.]+)?\.weight|(?<=embedding_A)(?:\.[^.]+)?)$"
)
_UP = re.compile(r"(lora_B|lora_embedding_B|lora_up|lora\.up)((?:\.[^.]+)?\.weight|(?<=embedding_B)(?:\.[^.]+)?)$")
# Adapters whose effect is not a plain product, and a bias that only the product's layer adds.
_OTHER_KINDS = re.compile(r"lora_magnitude_vector|dora_scale|lora_mid\.|hada_w|lokr_w|lora_B\.(?:[^.]+\.)?bias$")
# Starts that move the frozen weights as well, so that the network without the adapter is not theta_base.
_MOVED_STARTS = ("pissa", "olora", "corda", "loftq")
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # entry of a safetensors header


def is_lora(names: Iterable[str]) -> bool:
    """Whether a state dict with these names is an adapter, of a kind that we can merge or not."""
    return any(_DOWN.search(name) or _OTHER_KINDS.search(name) for name in names)


@dataclass(frozen=True)
class Pair:
    """What an adapter does to one module: adds scale * up @ down."""

    down: Tensor  # [r, in, ...]
    up: Tensor  # [out, r, ...]
    scale: float
    names: tuple[str, str]  # of down and up in the file


@dataclass(frozen=True)
class Adapter:
    """The pairs by module; `rest` are whole tensors saved with the adapter (heads, say)."""

    name: str  # the file, for messages
    pairs: dict[str, Pair]
    rest: dict[str, Tensor] = field(default_factory=dict)
    has_alphas: bool = False  # kohya's, one number per module
    scales_known: bool = False  # false: nothing said alpha, which loaders then take as equal to the rank

    @property
    def rank(self) -> int:
        return max(pair.down.shape[0] for pair in self.pairs.values())


def read_adapter(
    name: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
) -> Adapter:
    """The pairs in `state`, with the scale that loaders give them: alpha / r from kohya's alphas, from `config` (peft's
    adapter_config.json) or from the safetensors `header` (diffusers), else 1.

    Raises UserError for adapters of another kind, and for factors that do not fit each other.
    """
    other = [key for key in state if _OTHER_KINDS.search(key)]
    if other:
        raise UserError(f"{name}: {other[0]} makes it more than a plain LoRA; merge the network it gives instead")
    configs = _configs(name, config, header or {})
    pairs, rest, alphas = {}, dict(state), 0
    for key in state:
        match = _DOWN.search(key)
        if not match:
            continue
        up_key = f"{key[: match.start()]}{_UP_OF[match[1]]}{match[2]}"
        if up_key not in state:
            raise UserError(f"{name}: {up_key} is missing, the other factor of {key}")
        module = key[: match.start()].rstrip("._")
        down, up, alpha = rest.pop(key), rest.pop(up_key), rest.pop(f"{module}.alpha", None)
        if up.dim() < 2 or down.dim() < 2 or up.shape[1] != down.shape[0]:
            raise UserError(f"{name}: {key} {list(down.shape)} and {up_key} {list(up.shape)} are not of one rank")
        for part, tensor in ((key, down), (up_key, up)):
            if not is_finite(tensor):
                raise UserError(f"{name}: {part} holds numbers that are not finite; the adapter is broken")
        alphas += alpha is not None
        scale = _scale(module, down.shape[0], configs) if alpha is None else float(alpha) / down.shape[0]
        pairs[module] = Pair(down, up, scale, (key, up_key))
    lonely = [key for key in rest if _UP.search(key)]
    if lonely or not pairs:
        raise UserError(f"{name}: {f'{lonely[0]} has no other factor' if lonely else 'holds no LoRA factors'}")
    return Adapter(name, pairs, rest, alphas > 0, alphas == len(pairs) or bool(configs))


def _configs(name: str, config: Mapping[str, Any] | None, header: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Prefix of modules -> peft's settings for them."""
    configs: dict[str, Any] = {}
    if config is not None:
        configs = {"base_model.model.": config, "": config}
    elif _DIFFUSERS_CONFIG in header:
        for key, value in json.loads(header[_DIFFUSERS_CONFIG]).items():
            prefix, _, setting = key.rpartition(".")
            configs.setdefault(f"{prefix}." if prefix else "", {})[setting] = value
    for settings in configs.values():
        start = str(settings.get("init_lora_weights")).lower()
        if settings.get("peft_type", "LORA") != "LORA" or settings.get("use_dora"):
            raise UserError(f"{name}: its settings say that it is no plain LoRA; merge the network it gives instead")
        if start.startswith(_MOVED_STARTS):
            raise UserError(
                f"{name}: began with {start}, which also moves the frozen weights; convert it to plain LoRA"
            )
    return configs


def _scale(module: str, rank: int, configs: Mapping[str, Mapping[str, Any]]) -> float:
    for prefix, settings in configs.items():
        if module.startswith(prefix):
            patterns = (settings.get("alpha_pattern") or {}).items()
            inner = module.removeprefix(prefix)
            matching = (alpha for key, alpha in patterns if re.fullmatch(rf"(?:.*\.)?(?:{key})", inner))
            alpha = next(matching, settings.get("lora_alpha", rank))
            return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return 1.0


def reverse_lora(
    state: Mapping[str, Tensor],
    w: float,
    name: str = "the adapter",
    config: Mapping[str, Any] | None = None,
    header: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The adapter of theta_base - w (theta_syn - theta_base), where theta_syn is theta_base with the adapter `state`.

    It is the same adapter with -w times its `up` factors; names, ranks and alphas stay. (A negative alpha would say
    the same, but loaders that split it evenly between the factors cannot take one.) Half precision becomes float32,
    so that nothing is rounded. Raises UserError as `read_adapter`.
    """
    check_w(w)
    adapter = read_adapter(name, state, config, header)
    if adapter.rest:
        raise UserError(
            f"{name}: {next(iter(adapter.rest))} is a whole tensor, whose value in the base is not known here; "
            "merge it with an adapter of the base, or the networks themselves"
        )
    merged = {key: _wide(value) if value.is_floating_point() else value.clone() for key, value in state.items()}
    for pair in adapter.pairs.values():
        merged[pair.names[1]] = _finite(-w * _wide(pair.up), pair.names[1], w)
    return merged


def merge_lora(base: Adapter, syn: Adapter, w: float) -> tuple[dict[str, Tensor], int]:
    """(state, rank) of the adapter whose product is (1 + w) base - w syn in every module; its scale is 1.

    down = [A_base; A_syn], up = [(1 + w) s_base B_base, -w s_syn B_syn]. All modules get one rank, with zeros where
    there is less, so that loaders which guess alpha from it guess right. A module that only one side adapts has the
    product 0 in the other. Names are the base's; `rest` is merged as any state dict.
    """
    check_w(w)
    if not base.pairs.keys() & syn.pairs.keys():
        one, other = next(iter(base.pairs)), next(iter(syn.pairs))
        raise UserError(f"{base.name} and {syn.name} adapt no module in common ({one}, {other}): not of one network?")
    rest = neon_merge(base.rest, syn.rest, w)
    sides = [(coefficient, side) for coefficient, side in ((1 + w, base), (-w, syn)) if coefficient != 0]
    modules = dict.fromkeys(module for _, side in sides for module in side.pairs)
    merged = {module: _concatenated(module, sides) for module in modules}
    rank = max(down.shape[0] for down, _ in merged.values())
    state: dict[str, Tensor] = {}
    for module, (down, up) in merged.items():
        names = (base.pairs.get(module) or syn.pairs[module]).names
        state[names[0]] = _padded(down, 0, rank)
        state[names[1]] = _finite(_padded(up, 1, rank), names[1], w)
        if base.has_alphas or syn.has_alphas:
            state[f"{module}.alpha"] = torch.tensor(float(rank))
    return state | rest, rank


def _concatenated(module: str, sides: list[tuple[float, Adapter]]) -> tuple[Tensor, Tensor]:
    """(down, up) of the sum of coefficient * scale * up @ down over the sides that adapt the module."""
    parts = [(coefficient, side.pairs[module]) for coefficient, side in sides if module in side.pairs]
    downs = [_wide(pair.down) for _, pair in parts]
    ups = [coefficient * pair.scale * _wide(pair.up) for coefficient, pair in parts]
    if len({down.shape[1:] for down in downs}) > 1 or len({(up.shape[0], *up.shape[2:]) for up in ups}) > 1:
        raise UserError(f"{module}: of another shape in the two adapters; they are not of one network")
    return torch.cat(downs, 0), torch.cat(ups, 1)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in new memory."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim)


def _finite(factor: Tensor, name: str, w: float) -> Tensor:
    if not is_finite(factor):
        raise UserError(f"{name}: w = {w:g} leads beyond the range of {factor.dtype}; choose a smaller w")
    return factor


def merged_config(base: Mapping[str, Any], rank: int, modules: Iterable[str] | None = None) -> dict[str, Any]:
    """peft's settings for what `merge_lora` gives: rank r, scale 1. `modules` name all it adapts, where the two differ.

    Modules are then named in full, since nothing shorter is sure to fit both lists.
    """
    settings = {**base, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if modules is not None:
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
        inner = sorted(module.removeprefix("base_model.model.") for module in modules)
        settings |= {name: None for name in narrowing if name in base} | {"target_modules": inner}
    return settings


def merged_header(header: Mapping[str, str], rank: int) -> dict[str, str]:
    """The base's safetensors header for what `merge_lora` gives: nothing in it tells the old rank any more."""
    told = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    kept = {name: text for name, text in header.items() if name != _DIFFUSERS_CONFIG}
    return kept | {name: text for name, text in told.items() if name in kept}
