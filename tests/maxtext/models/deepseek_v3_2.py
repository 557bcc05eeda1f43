"""Tiny models of DeepSeek-V3.2: a DeepSeek-V3 whose attention is to the tokens that an indexer selects."""

from case import Case

_CONFIG = {
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
    # A score is the sum over the heads of what is positive. With few heads it is often zero, and the implementations
    # choose differently among equal scores.
    "index_n_heads": 9,
    "index_head_dim": 18,
    # Less than the tokens of the text, so that it matters which are selected.
    "index_topk": 7,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163_840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
}

_SETTINGS = {
    "attention": "dot_product",  # the only kind of which MaxText has this model on a CPU, for its converter too
    "indexer_n_heads": _CONFIG["index_n_heads"],
    "indexer_head_dim": _CONFIG["index_head_dim"],
    "indexer_topk": _CONFIG["index_topk"],
}

CASES = (
    Case(
        "deepseek_v3_2",
        "deepseek3.2-671b",
        "deepseek_v32",
        _CONFIG,
        "bfloat16",
        _SETTINGS,
        own_converter=("unscanned",),
    ),
)
