"""Gemma 1, 2, 3 and 4.

MaxText has its own number of tokens: more than the checkpoints of Gemma 1 and 2, fewer than those of Gemma 3.
"""

from collections.abc import Mapping
from typing import Any

from case import Case

# What surrounds the text model, as small as transformers builds it, but for Gemma 3's images, whose size MaxText knows.
# Not computed with: only the leaves of the vision towers are compared.
_GEMMA3_WRAPPER = {
    "mm_tokens_per_image": 256,
    "vision_config": {
        "hidden_size": 24,
        "image_size": 896,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
_GEMMA4_WRAPPER = {
    "vision_config": {
        "head_dim": 12,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "position_embedding_size": 20,
        "standardize": True,
    },
}

# What MaxText calls the sizes of the vision towers.
_VISION_NAMES = {
    "hidden_size": "hidden_size_for_vit",
    "image_size": "image_size_for_vit",
    "intermediate_size": "intermediate_size_for_vit",
    "num_attention_heads": "num_attention_heads_for_vit",
    "num_hidden_layers": "num_hidden_layers_for_vit",
    "patch_size": "patch_size_for_vit",
    "position_embedding_size": "num_position_embeddings_for_vit",
}
_GEMMA4_SMALL_WRAPPER = _GEMMA4_WRAPPER | {
    "audio_config": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "output_proj_dims": 16,
        "subsampling_conv_channels": [8, 4],
    },
}


def _seeing(wrapper: Mapping[str, Any]) -> dict[str, Any]:
    """Returns MaxText's settings of a model that has the vision tower."""
    sizes = {_VISION_NAMES[key]: size for key, size in wrapper["vision_config"].items() if key in _VISION_NAMES}
    return {"use_multimodal": True, **sizes}


def _gemma(**changes: Any) -> dict[str, Any]:
    """Returns what the configs of all Gemma models have. The window is shorter than the text, so that it matters."""
    sizes = {
        "vocab_size": 104,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 14,
    }
    return sizes | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True} | changes


def _local_and_global_rope(**global_rope: Any) -> dict[str, Mapping[str, Any]]:
    """Returns the rotary embeddings of local and global layers."""
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_theta": 1_000_000.0, **global_rope},
    }


_GEMMA1 = _gemma(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})

_GEMMA2 = _GEMMA1 | {"num_hidden_layers": 8, "sliding_window": 5}

# Two blocks of six layers, and three that are left over.
_GEMMA3 = _gemma(
    vocab_size=112,
    num_hidden_layers=15,
    rope_parameters=_local_and_global_rope(rope_type="linear", factor=8.0),
    sliding_window=5,
)

_GEMMA4 = _gemma(
    final_logit_softcapping=30.0,
    global_head_dim=24,
    hidden_size_per_layer_input=0,
    num_attention_heads=12,
    num_hidden_layers=12,
    num_key_value_heads=4,
    rope_parameters=_local_and_global_rope(rope_type="proportional", partial_rotary_factor=0.25),
    sliding_window=5,
)
_GEMMA4_LARGE = _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 3}
_GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "moe_intermediate_size": 26,
    "num_experts": 10,
    "top_k_experts": 4,
}


def _gemma4_small(cycle: int, **changes: Any) -> dict[str, Any]:
    """Returns a config whose last layer of each cycle is global, and whose last cycle has no keys and values."""
    layer_types = [*["sliding_attention"] * (cycle - 1), "full_attention"] * 2
    sizes = {"hidden_size_per_layer_input": 22, "num_hidden_layers": 2 * cycle, "vocab_size_per_layer_input": 104}
    return _GEMMA4 | sizes | {"layer_types": layer_types, "num_kv_shared_layers": cycle} | changes


# MaxText's layer is a local one and a global one together.
_PAIRS = {"base_num_decoder_layers": 4}

CASES = (
    Case("gemma1", "gemma-2b", "gemma", _GEMMA1, "bfloat16", {"vocab_size": 128}),
    Case(
        "gemma2",
        "gemma2-2b",
        "gemma2",
        _GEMMA2 | {"query_pre_attn_scalar": 14},
        "bfloat16",
        {"vocab_size": 128, **_PAIRS},
        own_converter=("scanned", "unscanned"),
    ),
    # Not the width of a head, as in the real model.
    Case(
        "gemma2_27b",
        "gemma2-27b",
        "gemma2",
        _GEMMA2 | {"query_pre_attn_scalar": 8},
        "float32",
        {"vocab_size": 128, **_PAIRS},
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "gemma3",
        "gemma3-4b",
        "gemma3",
        _GEMMA3 | {"query_pre_attn_scalar": 14},
        "bfloat16",
        {"vocab_size": 96, **_seeing(_GEMMA3_WRAPPER)},
        wrapper=_GEMMA3_WRAPPER,
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "gemma3_27b",
        "gemma3-27b",
        "gemma3",
        _GEMMA3 | {"query_pre_attn_scalar": 8, "num_hidden_layers": 12},
        "float32",
        {"vocab_size": 96},
        wrapper=_GEMMA3_WRAPPER,
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "gemma4",
        "gemma4-31b",
        "gemma4",
        _GEMMA4_LARGE,
        "bfloat16",
        wrapper=_GEMMA4_WRAPPER,
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "gemma4_moe",
        "gemma4-26b",
        "gemma4",
        _GEMMA4_LARGE | _GEMMA4_EXPERTS,
        "bfloat16",
        _seeing(_GEMMA4_WRAPPER),
        wrapper=_GEMMA4_WRAPPER,
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "gemma4_e2b",
        "gemma4-e2b",
        "gemma4",
        _gemma4_small(5, use_double_wide_mlp=True),
        "bfloat16",
        {"global_num_kv_heads": 0},
        wrapper=_GEMMA4_SMALL_WRAPPER,
        layouts=("unscanned",),
        own_converter=("unscanned",),
    ),
    Case(
        "gemma4_e4b",
        "gemma4-e4b",
        "gemma4",
        _gemma4_small(6),
        "bfloat16",
        {"global_num_kv_heads": 0},
        wrapper=_GEMMA4_SMALL_WRAPPER,
        layouts=("unscanned",),
        own_converter=("unscanned",),
    ),
)
