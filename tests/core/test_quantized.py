"""Codes beside a scale are recognised by every library's names; ordinary networks are never taken for quantized."""

import pytest
import torch

from neon_files.quantized import find_quantized

F32, F16, BF16, F8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
I8, U8, I16, I32, I64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64

QUANTIZED = {
    "bitsandbytes int8": ({"l.weight": I8, "l.bias": F16, "l.SCB": F32, "l.weight_format": U8}, ("l.weight", "l.SCB")),
    "bitsandbytes nf4": (
        {"l.weight": U8, "l.weight.absmax": U8, "l.weight.quant_map": F32, "l.weight.nested_absmax": F32},
        ("l.weight", "l.weight.absmax"),
    ),
    "nf4 packed in bfloat16": ({"l.weight": BF16, "l.weight.absmax": F32}, ("l.weight", "l.weight.absmax")),
    "nf4 state alone": (
        {"l.weight": U8, "l.weight.quant_state.bitsandbytes__nf4": U8},
        ("l.weight", "l.weight.quant_state.bitsandbytes__nf4"),
    ),
    "GPTQ": ({"l.qweight": I32, "l.qzeros": I32, "l.scales": F16, "l.g_idx": I32}, ("l.qweight", "l.scales")),
    "GPTQ without zeros": ({"l.qweight": I32, "l.scales": F16}, ("l.qweight", "l.scales")),
    "scaled float8": ({"l.weight": F8, "l.weight_scale": F32}, ("l.weight", "l.weight_scale")),
    "scaled float8, other order": ({"l.scale_weight": F32, "l.weight": F8}, ("l.weight", "l.scale_weight")),
    "block-scaled float8": ({"l.weight": F8, "l.weight_scale_inv": F32}, ("l.weight", "l.weight_scale_inv")),
    "float8 with a marker": ({"l.weight": F8, "scaled_fp8": F8}, ("l.weight", "scaled_fp8")),
    "described by JSON": ({"l.weight": F8, "l.comfy_quant": U8}, ("l.weight", "l.comfy_quant")),
    "compressed-tensors": ({"l.weight_packed": I32, "l.weight_scale": F16}, ("l.weight_packed", "l.weight_scale")),
    "4-bit floats": ({"m.up_blocks": U8, "m.up_scales": U8}, ("m.up_blocks", "m.up_scales")),
    "HQQ": ({"l.W_q": U8, "l.scale": F16, "l.zero": F16}, ("l.W_q", "l.scale")),
    "AQLM": ({"l.codes": I16, "l.codebooks": F16, "l.scales": F16}, ("l.codes", "l.codebooks")),
    "quanto": ({"l.weight._data": I8, "l.weight._scale": F32}, ("l.weight._data", "l.weight._scale")),
    "top level": ({"weight": I8, "weight_scale": F32}, ("weight", "weight_scale")),
}


def layout(types: dict) -> dict:
    return {name: (dtype, (4, 4)) for name, dtype in types.items()}


@pytest.mark.parametrize("library", QUANTIZED)
def test_codes_and_their_scale_are_named(library):
    types, pair = QUANTIZED[library]
    assert find_quantized(layout({"first.weight": F32, "first.position_ids": I64} | types)) == pair


@pytest.mark.parametrize(
    "types",
    [
        {"l.weight": F8, "l.bias": F16},  # plain float8
        {"n.weight": F32, "n.running_var": F32, "n.num_batches_tracked": I64},
        {"a.logit_scale": F32, "a.relative_position_index": I64, "a.qkv.weight": F32},  # Swin v2
        {"l.weight_g": F32, "l.weight_v": F32, "l.scale": F32, "logit_scale": F32},
        {"a.mask": U8, "a.scale": F32, "ids": I64, "scale_embed.weight": F32},
        {"l.weight": torch.complex64, "l.weight_scale": F32},
    ],
)
def test_ordinary_networks_are_not(types):
    assert find_quantized(layout(types)) is None


def test_many_names_take_no_time():
    """Flat names: every entry lies in one module."""
    types = {f"block{i}_weight": F16 for i in range(20_000)} | {f"block{i}_scale": F16 for i in range(20_000)}
    assert find_quantized(layout(types)) is None
