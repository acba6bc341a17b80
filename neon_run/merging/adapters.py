"""The kinds of adapters, by an allow-list, and the merge of each kind: in files and in folders of peft.

With an adapter_config.json its `peft_type` decides. LoRA is merged by its products (`lora`); a few kinds change the
weights by something linear in their numbers, so that merging the numbers merges the networks; every other kind is
refused. Without settings the names decide, and only those of LoRA are recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon_files.atomic import sha256_file
from neon_files.checkpoint import pack_metadata
from neon_files.errors import UserError, say
from neon_run.merging import lora
from neon_run.merging.steps import Steps
from neon_run.merging.weight_file import ADAPTER_CONFIG, WeightFile


@dataclass(frozen=True)
class LinearKind:
    """A kind of peft whose change of the weights is linear in the tensors that end in `trained`."""

    trained: str
    neutral: float = 0.0  # with these the network is the base
    fixed: str = ""  # ending of the tensors that must be equal in both adapters


# Each compared with peft's merge of the network (tests/core/test_adapters.py).
LINEAR = {
    "IA3": LinearKind("ia3_l", neutral=1.0),  # W * l
    "MISS": LinearKind("miss_block"),  # W + blocks; "bat": W + W blocks + blocks
    "SHIRA": LinearKind("shira_weight", fixed="shira_indices"),  # W + values in fixed places
    "C3A": LinearKind("c3a_kernel"),  # W + circulant(kernel)
    "FOURIERFT": LinearKind("fourierft_spectrum"),  # W + inverse FFT of a spectrum in fixed places
}
# Settings of peft that do not change the effect of the numbers on the weights.
_BOOKKEEPING = {
    "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "miss_dropout", "random_seed", "init_ia3_weights", "target_modules", "exclude_modules", "feedforward_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A merged adapter: its tensors, the header of its file, and peft's settings where they change."""

    state: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any] | None = None


def looks_like_adapter(path: Path, names: Iterable[str]) -> bool:
    """Whether these tensors in a file of this name are an adapter's, of a kind that we can merge or not."""
    return lora.is_adapter(names) or path.stem.startswith("adapter_model")  # as peft calls its files


def adapter_kind(part: WeightFile) -> str | None:
    """LORA or one of LINEAR; None for the weights of a network. Raises UserError for adapters of other kinds."""
    if not looks_like_adapter(part.path, part.loaders):
        return None
    if part.adapter_config is None:
        return "LORA"  # whose reader refuses other names
    kind = part.adapter_config.get("peft_type")
    if kind in ("LORA", *LINEAR):
        return kind
    allowed = ", ".join(("LORA", *LINEAR))
    problem = f"is of the kind {kind}" if kind else f"has no peft_type in its {ADAPTER_CONFIG}"
    raise UserError(
        f"{part.path}: {problem}; only {allowed} change the weights in a mergeable way: merge the networks instead"
    )


def read_lora(part: WeightFile, scale: float | None = None) -> lora.Adapter:
    """The factors of a file, with the scale that its settings and header state."""
    adapter = lora.read_adapter(str(part.path), part.state(), part.adapter_config, part.header, scale)
    if not adapter.scales_known:
        if adapter.scale_in_code:
            raise UserError(f"{part.path}: states no alpha, which differs between loaders; give --scale (alpha / r)")
        say(f"{part.path}: states no alpha; taken as equal to the rank, as loaders do")
    return adapter


def merge_adapters(base: WeightFile, syn: WeightFile, steps: Steps, scale: float | None = None) -> Merged:
    """The adapter of base - w (syn - base): equal to merging two networks with the adapters in their weights."""
    kinds = [adapter_kind(part) for part in (base, syn)]
    if kinds[0] != kinds[1]:
        descriptions = [f"{part.path} is {kind or 'no adapter'}" for part, kind in zip((base, syn), kinds, strict=True)]
        raise UserError(f"{', '.join(descriptions)}: only two of one kind are merged; `--lora` takes an adapter alone")
    record = {"rule": "neon", "base": _source(base), "synthetic": _source(syn)}
    header = pack_metadata(None, {"neon": {**steps.record(), **record}})
    if kinds[0] != "LORA":
        if scale is not None:
            raise UserError(f"--scale: applies to LoRA, {base.path} is {kinds[0]}")
        return Merged(_merge_linear(kinds[0] or "", base, syn, steps), {**base.header, **header})
    _check_settings(base, syn, ("fan_in_fan_out",))
    ours, theirs = read_lora(base, scale), read_lora(syn, scale)
    state, rank = lora.merge_lora(ours, theirs, steps)
    config = None
    if base.adapter_config is not None:
        modules = ours.pairs.keys() | theirs.pairs.keys() if ours.pairs.keys() != theirs.pairs.keys() else None
        config = lora.merged_config(base.adapter_config, rank, modules)
    return Merged(state, lora.merged_header(base.header, rank) | header, config)


def reversed_adapter(part: WeightFile, steps: Steps) -> Merged:
    """The adapter of theta_base - w (theta_syn - theta_base) for one that was trained on the base's own samples."""
    kind = adapter_kind(part)
    if kind is None:
        raise UserError(f"--lora {part.path}: holds no LoRA factors; give the two checkpoints without --lora")
    header = {
        **part.header,
        **pack_metadata(None, {"neon": {**steps.record(), "base": "no adapter", "synthetic": _source(part)}}),
    }
    if kind == "LORA":
        return Merged(lora.reverse_lora(part.state(), steps, str(part.path), part.adapter_config, part.header), header)
    trained, fixed = _numbers(kind, part)
    neutral = {name: torch.full_like(value, LINEAR[kind].neutral) for name, value in trained.items()}
    return Merged(_in_order(part, steps.merge(neutral, trained) | fixed), header)


def _source(part: WeightFile) -> dict[str, str]:
    return {"file": part.path.name, "sha256": sha256_file(part.path)}


def _merge_linear(kind: str, base: WeightFile, syn: WeightFile, steps: Steps) -> dict[str, Tensor]:
    _check_settings(base, syn)
    (ours, fixed), (theirs, other) = _numbers(kind, base), _numbers(kind, syn)
    unlike = next(
        (n for n in fixed.keys() | other.keys() if not torch.equal(*(s.get(n, _NONE) for s in (fixed, other)))), None
    )
    if unlike:
        raise UserError(f"{unlike}: differs between {base.path} and {syn.path}; their sum is no adapter of one {kind}")
    return _in_order(base, steps.merge(ours, theirs) | fixed)


_NONE = torch.empty(0)


def _numbers(kind: str, part: WeightFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trained tensors in at least float32, fixed ones). Other tensors of the file are refused."""
    trained, fixed = {}, {}
    for name, value in part.state().items():
        if name.endswith(LINEAR[kind].trained):
            trained[name] = lora.wide(value)
        elif LINEAR[kind].fixed and name.endswith(LINEAR[kind].fixed):
            fixed[name] = value
        else:
            raise UserError(
                f"{part.path}: {name} is not one of the numbers of {kind}; merge the network it gives instead"
            )
    if LINEAR[kind].fixed and len(fixed) != len(trained):
        raise UserError(f"{part.path}: lacks {LINEAR[kind].fixed} for some modules; save the adapter again")
    return trained, fixed


def _in_order(part: WeightFile, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in part.loaders}


def _check_settings(base: WeightFile, syn: WeightFile, names: Iterable[str] | None = None) -> None:
    """UserError where the two adapters' settings (these `names`, or all relevant ones) give numbers another meaning."""
    ours, theirs = base.adapter_config or {}, syn.adapter_config or {}
    for name in sorted((ours.keys() | theirs.keys()) - _BOOKKEEPING) if names is None else names:
        one, other = ours.get(name) or None, theirs.get(name) or None
        if one != other:
            raise UserError(f"{base.path} and {syn.path}: {name} is {one} in one's settings, {other} in the other's")
