"""Llama 2, 3, 3.1 and Mistral."""

from typing import Any

from case import Case


def _llama(theta: float, epsilon: float, **changes: Any) -> dict[str, Any]:
    """Returns a Llama or Mistral config."""
    sizes = {
        "vocab_size": 104,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    rope = {"rope_type": "default", "rope_theta": theta}
    return sizes | {"rms_norm_eps": epsilon, "rope_parameters": rope, "tie_word_embeddings": False} | changes


_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA31 = _llama(500_000.0, 1e-5, rope_parameters=_LLAMA31_ROPE, max_position_embeddings=131_072)


CASES = (
    # MaxText rotates interleaved pairs for llama3.1 and half-split pairs, as transformers does, for all other names.
    Case("llama31", "llama3.1-8b", "llama", _LLAMA31, "bfloat16", own_converter=("scanned", "unscanned")),
    Case(
        "llama31_plain",
        "llama3.1-8b",
        "llama",
        _llama(500_000.0, 1e-5),
        "float32",
        {"rope_use_scale": False},
        own_converter=("scanned", "unscanned"),
    ),
    Case("llama3", "llama3-8b", "llama", _llama(500_000.0, 1e-5), "bfloat16"),
    Case("llama2", "llama2-7b", "llama", _llama(10_000.0, 1e-5, num_key_value_heads=4), "float32"),
    Case("mistral", "mistral-7b", "mistral", _llama(1_000_000.0, 1e-5, sliding_window=None), "bfloat16"),
)
