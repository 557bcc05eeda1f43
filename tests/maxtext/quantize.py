"""Stores the tensors of a checkpoint as publishers do, for the cases that are quantized.

Each function takes the unquantized tensors by their published names. Values are chosen and packed by the formats' own
libraries where they do it on a CPU, and what the stored tensors stand for is computed in float32, unrounded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  The name that torch's own documentation gives it.
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

# As in the config.json of Kimi-K2-Thinking.
_INT4: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}

# As in the config.json of DeepSeek-V3.
_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

# As in the config.json of gpt-oss.
_MXFP4: dict[str, Any] = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

# MXFP4 as compressed-tensors describes it, whose quantizer serves for gpt-oss too: that of transformers needs a GPU.
_MXFP4_OF_COMPRESSED_TENSORS: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "group_size": 32,
                "num_bits": 4,
                "scale_dtype": "torch.uint8",
                "strategy": "group",
                "symmetric": True,
                "type": "float",
            },
        }
    },
    "format": "mxfp4-pack-quantized",
    "quant_method": "compressed-tensors",
}

# The largest number of E4M3.
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Quantized:
    """A checkpoint in a quantized format.

    Attributes:
      stored: the tensors by name, as on disk.
      dequantized: what they stand for, by the names of the unquantized checkpoint.
      config: the `quantization_config` of its config.json.
    """

    stored: dict[str, Tensor]
    dequantized: dict[str, Tensor]
    config: dict[str, Any]


def int4(tensors: Mapping[str, Tensor]) -> Quantized:
    """The routed experts in INT4 with groups of 32, by compressed-tensors, as in Kimi-K2-Thinking."""
    scheme, compressor = _compressed_tensors(_INT4)
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            stored[name] = dequantized[name] = tensor
            continue
        scale = _scale(tensor, scheme).to(torch.bfloat16)
        module = compressor.compress({"weight": tensor.float(), "weight_scale": scale.float()}, scheme)
        prefix = name.removesuffix("weight")
        # In bfloat16 compressed-tensors would round the product; in float32 it is exact.
        dequantized[name] = compressor.decompress(module, scheme)["weight"].float()
        stored |= {prefix + key: value for key, value in (module | {"weight_scale": scale}).items()}
    return Quantized(stored, dequantized, _INT4)


def fp8(tensors: Mapping[str, Tensor]) -> Quantized:
    """All projections in E4M3 with a scale for each block, as DeepSeek-V3 is published: scale = amax / 448."""
    rows, columns = _FP8["weight_block_size"]
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        if re.search(r"_proj(_with_mqa)?\.weight$", name) is None:
            stored[name] = dequantized[name] = tensor
            continue
        out, width = tensor.shape
        padded = F.pad(tensor.float(), (0, -width % columns, 0, -out % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax((1, 3)) / _E4M3_MAX
        # The scale of each element; the last blocks of both axes are cut off.
        scales = scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :width]
        codes = (tensor.float() / scales).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale_inv": scale}
        dequantized[name] = codes.float() * scales
    return Quantized(stored, dequantized, _FP8)


def mxfp4(tensors: Mapping[str, Tensor]) -> Quantized:
    """The experts in MXFP4, as gpt-oss is published: packed by compressed-tensors, read by transformers."""
    scheme, compressor = _compressed_tensors(_MXFP4_OF_COMPRESSED_TENSORS)
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = dequantized[name] = tensor
            continue
        experts, width, out = tensor.shape
        rows = tensor.float().transpose(1, 2).reshape(experts * out, width)
        module = compressor.compress({"weight": rows, "weight_scale": _scale(rows, scheme)}, scheme)
        blocks = module["weight_packed"].reshape(experts, out, width // 32, 16)
        scales = module["weight_scale"].reshape(experts, out, width // 32)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dequantized[name] = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return Quantized(stored, dequantized, _MXFP4)


QUANTIZE: dict[str, Callable[[Mapping[str, Tensor]], Quantized]] = {"int4": int4, "fp8": fp8, "mxfp4": mxfp4}


def _compressed_tensors(config: Mapping[str, Any]) -> tuple[QuantizationScheme, type[BaseCompressor]]:
    """The scheme that a config describes, and the compressor that compressed-tensors has for it."""
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    return scheme, BaseCompressor.get_value_from_registry(config["format"])


def _scale(tensor: Tensor, scheme: QuantizationScheme) -> Tensor:
    """The scale of each group that compressed-tensors chooses, in float32."""
    groups = tensor.float().unflatten(-1, (-1, scheme.weights.group_size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    return scale
