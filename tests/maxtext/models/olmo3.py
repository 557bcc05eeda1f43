"""OLMo 3."""

from typing import Any

from case import Case

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8192,
}

_OLMO3: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 60,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "sliding_window": 5,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65_536,
    # transformers has YaRN in global layers only, MaxText in all of them; neither changes the weights.
    "rope_parameters": {"sliding_attention": _YARN, "full_attention": _YARN},
}

# transformers derives it; MaxText is told.
_HEAD_DIM = {"head_dim": 10}

CASES = (Case("olmo3", "olmo3-7b", "olmo3", _OLMO3, "bfloat16", _HEAD_DIM, own_converter=("scanned", "unscanned")),)
