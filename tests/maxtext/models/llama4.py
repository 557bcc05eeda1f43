"""Llama 4."""

from typing import Any

from case import Case

# The vision tower of the smallest size that transformers builds; MaxText's text models do not read it.
_VISION = {
    "hidden_size": 24,
    "image_size": 28,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
}

_WRAPPER = {"vision_config": _VISION}


def _llama4(**changes: Any) -> dict[str, Any]:
    """Returns a Llama 4 config. The chunks are shorter than the text, so that it matters which layers have them."""
    sizes = {
        "vocab_size": 104,
        "hidden_size": 48,
        "intermediate_size": 26,
        "intermediate_size_mlp": 80,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "num_local_experts": 10,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 5,
        "use_qk_norm": True,
    }
    return sizes | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 262_144} | changes


_SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MAVERICK_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}

# transformers' width is that of experts; MaxText has both.
_WIDTHS = {"base_mlp_dim": 80, "base_moe_mlp_dim": 26}

CASES = (
    Case(
        "llama4",
        "llama4-17b-16e",
        "llama4",
        _llama4(rope_parameters=_SCOUT_ROPE),
        "bfloat16",
        _WIDTHS,
        wrapper=_WRAPPER,
    ),
    Case(
        "llama4_128e",
        "llama4-17b-128e",
        "llama4",
        _llama4(interleave_moe_layer_step=2, rope_parameters=_MAVERICK_ROPE, use_qk_norm=False),
        "bfloat16",
        _WIDTHS,
        wrapper=_WRAPPER,
    ),
)
