"""Quantized checkpoints, recognised by names and types: weights stored as codes with a scale.

Separate arithmetic on codes and scales is no arithmetic on the weights, so code that combines two files refuses these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

# Entries that only quantized checkpoints have, whatever type holds the codes: 4-bit codes may be packed in bfloat16.
_SURE = re.compile(r"(nested_)?(absmax|quant_map)|SCB|quant_state|comfy_quant")
# Scales by any spelling: weight_scale, scale_weight, scales, wscales, weight_scale_inv, zero_point, codebooks.
_SCALE = re.compile(r"scale|(^|_)zeros?(_?points?)?$|codebooks?$|centroids$", re.IGNORECASE)
# Entries in which libraries keep codes: bitsandbytes, GPTQ, AWQ, HQQ, AQLM, QuIP#, VPTQ, quanto, torchao.
_CODES = re.compile(
    r"weight|kernel|qweight|qdata|weight_packed|W_q|codes|Qidxs|indices|_?data|(weight_)?int_(data|repr)"
)


def find_quantized(layout: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> tuple[str, str] | None:
    """The first (tensor of codes, its scale) in a table name -> (dtype, shape); None where the numbers are the weights.

    Recognised by name: bitsandbytes int8 (SCB) and 4-bit (absmax, quant_map), GPTQ and AWQ (qweight, qzeros, scales),
    HQQ, AQLM, quanto, torchao, compressed-tensors; and every whole-number or float8 tensor whose scale lies beside it.
    Plain float8, and whole-number buffers, are not quantized.
    """
    codes = defaultdict(list)  # module -> names of the entries directly in it that may be codes
    for name, (dtype, _) in layout.items():
        if _may_be_codes(dtype):
            codes[name.rpartition(".")[0]].append(name)
    for scale in layout:
        module, _, leaf = scale.rpartition(".")
        above = _tensor_above(scale, layout)
        if above and (
            _SURE.match(scale[len(above) + 1 :]) or (_SCALE.search(leaf) and _may_be_codes(layout[above][0]))
        ):
            return above, scale
        if _SURE.match(leaf):
            beside = f"{module}.weight".lstrip(".")
            return next(iter(codes[module]), beside if beside in layout else scale), scale
        if leaf == "scaled_fp8":
            marked = next((name for name, (dtype, _) in layout.items() if name != scale and _is_float8(dtype)), None)
            if marked:
                return marked, scale
        elif _SCALE.search(leaf):
            for name in codes[module]:
                if name != scale and _is_scale_of(leaf, name.rpartition(".")[2]):
                    return name, scale
    return None


def _tensor_above(name: str, layout: Mapping) -> str | None:
    """`lin.weight` for `lin.weight.absmax` and `lin.weight.quant_state.bitsandbytes__nf4`, if it is a tensor."""
    above = name
    for _ in range(2):
        above = above.rpartition(".")[0]
        if above in layout:
            return above
    return None


def _is_scale_of(scale: str, leaf: str) -> bool:
    """Does the scale belong to `leaf` beside it: the module's only codes by a known name, or named after it?"""
    stem = re.sub(r"_(blocks|packed|quantized|codes|q)$", "", leaf)
    return bool(_CODES.fullmatch(leaf)) or scale.startswith(stem) or scale.endswith(f"_{stem}")


def _may_be_codes(dtype: torch.dtype) -> bool:
    whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return whole or _is_float8(dtype)


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
