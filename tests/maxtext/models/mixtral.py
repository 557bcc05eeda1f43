"""Mixtral."""

from typing import Any

from case import Case

_MIXTRAL: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "num_local_experts": 10,
    "num_experts_per_tok": 4,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}

# MaxText has another name for the width of experts, even in a model without other layers.
_WIDTH = {"base_moe_mlp_dim": _MIXTRAL["intermediate_size"]}

CASES = (Case("mixtral", "mixtral-8x7b", "mixtral", _MIXTRAL, "bfloat16", _WIDTH, own_converter=("unscanned",)),)
