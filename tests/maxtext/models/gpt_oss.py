"""gpt-oss."""

from typing import Any

from case import Case


def _gpt_oss(**changes: Any) -> dict[str, Any]:
    """Returns a gpt-oss config. The window is shorter than the text, so that it matters which layers have it."""
    sizes = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_local_experts": 10,
        "num_experts_per_tok": 4,
        "sliding_window": 5,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope = yarn | {"truncate": False, "original_max_position_embeddings": 4096}
    rest = {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "max_position_embeddings": 131_072}
    return sizes | rest | {"rope_parameters": rope, "tie_word_embeddings": False} | changes


# MaxText has another name for the width of experts, even in a model without other layers.
_GPT_OSS_WIDTH = {"base_moe_mlp_dim": _gpt_oss()["intermediate_size"]}

CASES = (
    # Lossless in bfloat16 too.
    Case(
        "gpt_oss",
        "gpt-oss-20b",
        "gpt_oss",
        _gpt_oss(),
        "bfloat16",
        _GPT_OSS_WIDTH,
        save_dtype="bfloat16",
        own_converter=("scanned", "unscanned"),
    ),
    Case("gpt_oss_mxfp4", "gpt-oss-120b", "gpt_oss", _gpt_oss(), "bfloat16", _GPT_OSS_WIDTH, quantization="mxfp4"),
)
