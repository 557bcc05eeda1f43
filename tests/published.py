"""What published checkpoints say about their quantization: sections of `config.json`, and files beside it, by format.

Each is spelled as its publisher or its library spells it, so that a test that uses one also tests how it is read.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

Config: TypeAlias = dict[str, Any]

# OpenAI gpt-oss.
GPT_OSS: Config = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

# MiniMax-M3: FP8 with a scale for 32 columns, the eight bits of an exponent.
MXFP8: Config = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "scale_fmt": "ue8m0",
    "ignored_layers": ["lm_head"],
}

# AutoFP8, and transformers without a block size: one scale a tensor.
FP8_PER_TENSOR: Config = {"quant_method": "fp8", "activation_scheme": "static"}

# Meta's Llama-3.1-405B-FP8: one scale a row.
FBGEMM_FP8: Config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}

# Xiaomi's MiMo-V2: experts in MXFP4 beside block FP8.
MIMO: Config = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "store_dtype": "mxfp4",
    "mxfp4_block_size": 32,
    "ignored_layers": ["lm_head"],
}


def fp8_blocks(block: Sequence[int] = (128, 128), **more: Any) -> Config:
    """DeepSeek-V3; later models add `scale_fmt`, and DeepSeek-V4 `expert_dtype`."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        **more,
    }


def compressed_tensors(layout: str, *, ignore: Sequence[str] = ("lm_head",), **weights: Any) -> Config:
    """What llm-compressor writes: the format's name, and the arguments of the weights' quantization."""
    arguments: Config = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": {**group, "weights": arguments | weights}},
    }


def modelopt(algorithm: str, *, ignore: Sequence[str] = ("lm_head",), **weights: Any) -> Config:
    """What NVIDIA's ModelOpt puts into `config.json`; some algorithms come without arguments of the weights."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        **({"config_groups": {"group_0": group}} if weights else {}),
        "ignore": list(ignore),
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }


def hf_quant_config(algorithm: str, **more: Any) -> Config:
    """What ModelOpt puts into `hf_quant_config.json`."""
    return {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
            **more,
        },
    }


def gptq(bits: int, group_size: int, *, desc_act: bool, checkpoint_format: str | None = "gptq") -> Config:
    """AutoGPTQ's and gptqmodel's section; without `checkpoint_format` it is `gptq`, whose zeros are stored less one."""
    named = {} if checkpoint_format is None else {"checkpoint_format": checkpoint_format}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": True,
        "lm_head": False,
        "true_sequential": True,
        **named,
    }


def awq(group_size: int) -> Config:
    """AutoAWQ's section of transformers' `config.json`."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def bitsandbytes(quant_type: str, *, nested: bool) -> Config:
    """What transformers writes for a model that bitsandbytes has quantized to 4 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }


def mlx(bits: int, group_size: int, mode: str | None = None) -> Config:
    """What mlx-lm puts into `config.json` under `quantization`."""
    return {"group_size": group_size, "bits": bits, **({} if mode is None else {"mode": mode})}
