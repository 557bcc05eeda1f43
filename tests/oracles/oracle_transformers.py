"""transformers: block FP8, MXFP8, and the FP4 experts of DeepSeek-V4 and gpt-oss."""

from types import SimpleNamespace
from typing import Any

import torch
from formats import Format, Quantized, Shape, random_integers
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

# The library takes the block size from the shapes, which is silently wrong where a block is cut off.
WHOLE_BLOCKS: tuple[Shape, ...] = ((128, 128), (256, 384), (640, 256))
WHOLE_GROUPS: tuple[Shape, ...] = ((48, 256), (1, 32), (131, 160))

MXFP4_GROUP = 32

# Scales of weights: powers of two from 2**-16 to 2**3, in E8M0.
SMALLEST_EXPONENT, LARGEST_EXPONENT = 111, 130


def block_fp8(scale_format: str | None) -> Format:
    """Block FP8 as `save_pretrained` writes it."""
    block = (128, 128)
    section: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    arguments = {} if scale_format is None else {"scale_fmt": scale_format}
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block, **arguments))

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        stored = Fp8Quantize(quantizer)._quantize_one("m.weight", weight)
        codes, scale = stored["m.weight"], stored["m.weight_scale_inv"]
        exact = Fp8Dequantize(quantizer)._dequantize_one(codes, scale, torch.float32)
        return Quantized({"weight": codes, "weight_scale_inv": scale}, exact)

    config = {"quantization_config": section | arguments}
    return Format(f"transformers-fp8-{scale_format or 'float32'}", config, quantize, WHOLE_BLOCKS)


def mxfp8(weight: Tensor, random: torch.Generator) -> Quantized:
    """FP8 in groups of 32, with random scales in U8."""
    groups = (weight.shape[0], weight.shape[1] // MXFP4_GROUP)
    scale = random_integers(SMALLEST_EXPONENT, LARGEST_EXPONENT, groups, random).to(torch.uint8)
    codes = (weight * 64).to(torch.float8_e4m3fn)
    exact = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return Quantized({"weight": codes, "weight_scale_inv": scale}, exact)


def deepseek_v4(weight: Tensor, random: torch.Generator) -> Quantized:
    """FP4 in groups of 32 as DeepSeek-V4 has it: random codes, for the library only reads it."""
    rows, columns = weight.shape
    codes = random_integers(-128, 128, (rows, columns // 2), random).to(torch.int8)
    exponents = random_integers(SMALLEST_EXPONENT, LARGEST_EXPONENT, (rows, columns // MXFP4_GROUP), random)
    scale = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    exact = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return Quantized({"weight": codes, "scale": scale}, exact)


def gpt_oss(weight: Tensor, random: torch.Generator) -> Quantized:
    """FP4 of several experts as gpt-oss has it: random codes, for the library writes it on a GPU only."""
    experts, columns, out = weight.shape
    groups = columns // MXFP4_GROUP
    blocks = random_integers(0, 256, (experts, out, groups, MXFP4_GROUP // 2), random).to(torch.uint8)
    scales = random_integers(SMALLEST_EXPONENT, LARGEST_EXPONENT, (experts, out, groups), random).to(torch.uint8)
    exact = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return Quantized({"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}, exact)


MXFP8_CONFIG = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, MXFP4_GROUP],
    "scale_fmt": "ue8m0",
}
DEEPSEEK_V4_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
GPT_OSS_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}

FORMATS: tuple[Format, ...] = (
    block_fp8(None),
    block_fp8("ue8m0"),
    Format("mxfp8", {"quantization_config": MXFP8_CONFIG}, mxfp8, WHOLE_GROUPS),
    Format(
        "deepseek-v4-fp4",
        {"quantization_config": DEEPSEEK_V4_CONFIG, "expert_dtype": "fp4"},
        deepseek_v4,
        WHOLE_GROUPS,
    ),
    Format(
        "gpt-oss",
        {"quantization_config": GPT_OSS_CONFIG},
        gpt_oss,
        ((3, 96, 40), (1, 32, 6), (2, 2880, 10)),
        parameter="gate_up_proj",
    ),
)
