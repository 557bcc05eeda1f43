"""A tiny model of every architecture: its `config.json`, and a checkpoint of random values with the names of the rules.

All sizes that could be confused differ, so that an axis in the wrong place cannot have the right length.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import stored

from slicecast.configs import families
from slicecast.convert.box import Box
from slicecast.convert.mapping.rules import Constant, Join, Model, ModelOptions
from slicecast.convert.mapping.target import Layout, leaves

Config: TypeAlias = dict[str, Any]

_ATTENTION: Config = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 56,
}
_EXPERTS: Config = {"num_experts": 6, "moe_intermediate_size": 14}
_GATED: Config = (
    _ATTENTION
    | _EXPERTS
    | {
        "num_hidden_layers": 8,
        "shared_expert_intermediate_size": 18,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 5,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": False,
    }
)
_VISION: Config = {
    "hidden_size": 12,
    "num_heads": 3,
    "depth": 2,
    "intermediate_size": 22,
    "spatial_merge_size": 2,
    "num_position_embeddings": 9,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "patch_size": 5,
    "deepstack_visual_indexes": [0, 1],
}
_AUDIO: Config = {
    "d_model": 16,
    "encoder_attention_heads": 2,
    "encoder_layers": 2,
    "encoder_ffn_dim": 26,
    "num_mel_bins": 11,
    "downsample_hidden_size": 7,
}
_DEEPSEEK: Config = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "q_lora_rank": 9,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "vocab_size": 56,
    "tie_word_embeddings": False,
}
_GEMMA4: Config = _ATTENTION | {
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}


def _named(architecture: str, config: Config) -> Config:
    return {"architectures": [architecture], **config}


# By a name for the test, every architecture in every form that its rules distinguish.
CONFIGS: dict[str, Config] = {
    "llama": _named("LlamaForCausalLM", _ATTENTION | {"num_hidden_layers": 3}),
    "llama tied": _named("LlamaForCausalLM", _ATTENTION | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "mistral": _named("MistralForCausalLM", _ATTENTION | {"num_hidden_layers": 3}),
    "llama4": _named(
        "Llama4ForConditionalGeneration",
        {
            "text_config": _ATTENTION
            | {"num_hidden_layers": 8, "num_local_experts": 6, "interleave_moe_layer_step": 2}
            | {"intermediate_size_mlp": 34}
        },
    ),
    "llama4 text": _named(
        "Llama4ForCausalLM",
        _ATTENTION | {"num_hidden_layers": 4, "num_local_experts": 6, "interleave_moe_layer_step": 1},
    ),
    "mixtral": _named("MixtralForCausalLM", _ATTENTION | {"num_hidden_layers": 3, "num_local_experts": 6}),
    "gpt-oss": _named(
        "GptOssForCausalLM",
        _ATTENTION
        | {"num_hidden_layers": 4, "num_local_experts": 6, "tie_word_embeddings": False, "attention_bias": True}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "olmo3": _named("Olmo3ForCausalLM", _ATTENTION | {"num_hidden_layers": 8, "tie_word_embeddings": False}),
    "qwen2": _named("Qwen2ForCausalLM", _ATTENTION | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "qwen3": _named("Qwen3ForCausalLM", _ATTENTION | {"num_hidden_layers": 3, "tie_word_embeddings": False}),
    "qwen3 moe": _named("Qwen3MoeForCausalLM", _ATTENTION | _EXPERTS | {"num_hidden_layers": 3}),
    "qwen3-vl": _named(
        "Qwen3VLForConditionalGeneration",
        {"text_config": _ATTENTION | {"num_hidden_layers": 3}, "vision_config": _VISION, "tie_word_embeddings": True},
    ),
    "weaver": _named(
        "WeaverForConditionalGeneration",
        {"text_config": _ATTENTION | {"num_hidden_layers": 3}, "vision_config": _VISION, "tie_word_embeddings": False},
    ),
    "weaver omni": _named(
        "WeaverOmniForConditionalGeneration",
        {"text_config": _ATTENTION | {"num_hidden_layers": 3}, "vision_config": _VISION, "tie_word_embeddings": False},
    ),
    "qwen3-vl moe": _named(
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": _ATTENTION | _EXPERTS | {"num_hidden_layers": 3}, "vision_config": _VISION},
    ),
    "qwen3-omni": _named(
        "Qwen3OmniMoeForConditionalGeneration",
        {
            "thinker_config": {
                "text_config": _ATTENTION | _EXPERTS | {"num_hidden_layers": 3},
                "vision_config": _VISION,
                "audio_config": _AUDIO,
            }
        },
    ),
    "qwen3-next": _named("Qwen3NextForCausalLM", _GATED),
    "qwen3.5": _named("Qwen3_5MoeForConditionalGeneration", {"text_config": _GATED}),
    "qwen3.5 text": _named("Qwen3_5MoeForCausalLM", _GATED),
    "gemma": _named("GemmaForCausalLM", _ATTENTION | {"num_hidden_layers": 3}),
    "gemma2": _named("Gemma2ForCausalLM", _ATTENTION | {"num_hidden_layers": 4, "query_pre_attn_scalar": 12}),
    "gemma3": _named("Gemma3ForConditionalGeneration", {"text_config": _ATTENTION | {"num_hidden_layers": 14}}),
    "gemma3 text": _named("Gemma3ForCausalLM", _ATTENTION | {"num_hidden_layers": 14}),
    "gemma4": _named("Gemma4ForConditionalGeneration", {"text_config": _GEMMA4}),
    "gemma4 moe": _named("Gemma4ForCausalLM", _GEMMA4 | _EXPERTS | {"enable_moe_block": True}),
    "gemma4 small": _named(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": _GEMMA4
            | {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
            | {"attention_k_eq_v": False, "num_global_key_value_heads": None, "num_kv_shared_layers": 3}
            | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 52, "use_double_wide_mlp": True}
        },
    ),
    "deepseek-v2": _named("DeepseekV2ForCausalLM", _DEEPSEEK | {"q_lora_rank": None}),
    "deepseek-v3": _named("DeepseekV3ForCausalLM", _DEEPSEEK | {"num_nextn_predict_layers": 1}),
    "deepseek-v3.2": _named("DeepseekV32ForCausalLM", _DEEPSEEK | {"index_n_heads": 3, "index_head_dim": 6}),
    "kimi-k2.6": _named("KimiK25ForConditionalGeneration", {"text_config": _DEEPSEEK}),
    "deepseek-v4": _named(
        "DeepseekV4ForCausalLM",
        {
            "hidden_size": 24,
            "moe_intermediate_size": 14,
            "num_hidden_layers": 7,
            "num_hash_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "q_lora_rank": 9,
            "o_groups": 2,
            "o_lora_rank": 11,
            "index_n_heads": 3,
            "index_head_dim": 6,
            "hc_mult": 2,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "vocab_size": 56,
        },
    ),
}


def model(name: str, options: ModelOptions = ModelOptions()) -> Model:  # noqa: B008  It is frozen.
    """What the family says about a tiny model."""
    return families.recognize(CONFIGS[name], options)


# The layouts that MaxText has of each: the name, and whether layers are scanned.
TREES = [
    (name, scan_layers)
    for name in CONFIGS
    for scan_layers in (True, False)
    if not (scan_layers and model(name).unscanned_only)
]


def tensors(model: Model, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Random tensors for all that a model's rules read: float32 where the result is, whole numbers in tables."""
    random = np.random.default_rng(seed)
    found: dict[str, tuple[str, np.ndarray]] = {}
    for rule in model.rules:
        members: tuple[tuple[str, tuple[int, ...]], ...] = ()
        match rule.source:
            case Constant():
                continue
            case Join(named):
                members = named
            case name:
                rows = rule.shape[:1] if rule.stored_rows is None else (rule.stored_rows,)
                members = ((name, rows + rule.shape[1:]),)
        for leaf in leaves(rule, Layout(scan_layers=False)):
            for coordinate in leaf.coordinates(Box.whole(leaf.shape)):
                for pattern, shape in members:
                    name = leaf.source(pattern, coordinate)
                    if name.endswith("tid2eid"):
                        found[name] = ("I64", random.integers(0, 1000, shape))
                    elif rule.dtype == "float32" and "norm" not in name:
                        found[name] = ("F32", random.standard_normal(shape, np.float32))
                    else:
                        found[name] = ("BF16", random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
    return found


def write(directory: Path, name: str, *, seed: int = 1, changes: Mapping[str, Any] | None = None) -> Path:
    """Writes the checkpoint of a tiny model, whose config may have other top-level fields."""
    config = CONFIGS[name] | dict(changes or {})
    return stored.write(directory, tensors(families.recognize(config), seed), config)
