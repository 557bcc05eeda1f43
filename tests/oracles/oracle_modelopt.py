"""NVIDIA's ModelOpt: NVFP4, FP8 and MXFP8."""

from typing import Any

import torch
from formats import Format, Quantized
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from torch import Tensor

GROUP = 16


def dequantize(weight: Tensor, scale: Tensor, second_scale: Tensor | None) -> Tensor:
    """The library's weight in float32 from a weight and its scales."""
    exact: Tensor
    if second_scale is not None:
        shape = (*weight.shape[:-1], 2 * weight.shape[-1])
        decoder: Any = NVFP4QTensor(shape, torch.float32, weight)
        exact = decoder.dequantize(torch.float32, scale=scale, double_scale=second_scale, block_sizes={-1: GROUP})
    elif scale.dtype == torch.uint8:
        exact = MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    else:
        blocks = {}
        if scale.ndim > 0:  # Blocks of a matrix, with an axis of length one after each axis.
            scale = scale.reshape(scale.shape[0], -1)
            blocks = {axis: weight.shape[axis] // scale.shape[axis] for axis in (0, 1)}
        decoder = FP8QTensor(weight.shape, torch.float32, weight)
        exact = decoder.dequantize(torch.float32, scale=scale, block_sizes=blocks)
    return exact


def nvfp4(weight: Tensor, random: torch.Generator) -> Quantized:
    """NVFP4 with a second scale by which the first is multiplied."""
    codes, scale, second_scale = NVFP4QTensor.quantize(weight.clone(), GROUP)
    packed = codes._quantized_data
    stored = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": second_scale,
        "input_scale": torch.tensor(1.0),
    }
    return Quantized(stored, dequantize(packed, scale, second_scale))


CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP},
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.47.0"},
}

FORMATS: tuple[Format, ...] = (
    Format(
        "modelopt-nvfp4",
        {"quantization_config": CONFIG},
        nvfp4,
        ((48, 256), (1, 16), (131, 144)),
        zeros_have_signs=False,
    ),
)
