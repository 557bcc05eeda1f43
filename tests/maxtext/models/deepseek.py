"""DeepSeek-V2, DeepSeek-V3 and Kimi-K2."""

from collections.abc import Mapping
from typing import Any

from case import Case


def _deepseek(theta: float, yarn: Mapping[str, float], **changes: Any) -> dict[str, Any]:
    """Returns a DeepSeek config, with the sizes of DeepSeek-V3 scaled down."""
    sizes = {
        "vocab_size": 112,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 26,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 28,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 12,
        "v_head_dim": 14,
    }
    rope = {"rope_type": "yarn", "rope_theta": theta, "original_max_position_embeddings": 4096, **yarn}
    rest = {"rms_norm_eps": 1e-6, "n_group": 1, "topk_group": 1, "tie_word_embeddings": False}
    return sizes | rest | {"rope_parameters": rope, "max_position_embeddings": 163_840} | changes


def _kimi(**changes: Any) -> dict[str, Any]:
    """Returns a Kimi-K2 config; the experts' input sizes are multiples of the quantization group of 32."""
    yarn = {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    sizes = {"vocab_size": 120, "hidden_size": 64, "moe_intermediate_size": 96, "first_k_dense_replace": 1}
    rest = {"max_position_embeddings": 131_072, "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0}
    return _deepseek(50_000.0, yarn) | sizes | rest | changes


_DEEPSEEK_YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}

_DEEPSEEK3_YARN = _DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
_DEEPSEEK3 = _deepseek(10_000.0, _DEEPSEEK3_YARN, routed_scaling_factor=2.5, num_nextn_predict_layers=0)

# Blocks of 128 by 128 are ragged along both axes of every projection, and all but the output projection, whose 84
# columns are less than a block, have several along both.
_DEEPSEEK3_RAGGED = _DEEPSEEK3 | {
    "hidden_size": 192,
    "intermediate_size": 264,
    "moe_intermediate_size": 160,
    "q_lora_rank": 140,
    "kv_lora_rank": 136,
}

CASES = (
    Case("deepseek3", "deepseek3-671b", "deepseek_v3", _DEEPSEEK3, "float32", own_converter=("unscanned",)),
    Case(
        "deepseek3_mtp",
        "deepseek3-671b",
        "deepseek_v3",
        _DEEPSEEK3 | {"num_nextn_predict_layers": 1},
        "bfloat16",
    ),
    Case("deepseek3_fp8", "deepseek3-671b", "deepseek_v3", _DEEPSEEK3_RAGGED, "bfloat16", quantization="fp8"),
    Case(
        "deepseek2",
        "deepseek2-16b",
        "deepseek_v2",
        _deepseek(
            10_000.0,
            _DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            first_k_dense_replace=1,
            n_shared_experts=2,
            q_lora_rank=None,
            routed_scaling_factor=1.0,
            topk_method="greedy",
            norm_topk_prob=False,
        ),
        "bfloat16",
        # The default dtype, and lossless: the source has it, and nothing in this model is scaled.
        save_dtype="bfloat16",
        own_converter=("unscanned",),
    ),
    Case("kimi_int4", "kimi-k2-1t", "deepseek_v3", _kimi(), "bfloat16", quantization="int4"),
    Case("kimi26_int4", "kimi-k2-1t", "deepseek_v3", _kimi(), "bfloat16", quantization="int4", multimodal=True),
)
