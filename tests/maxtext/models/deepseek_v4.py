"""Tiny models of DeepSeek-V4."""

import re
from collections.abc import Mapping
from typing import Any

from case import Case

# One token of a layer's attention for each token, four tokens or 128 tokens of the text. After the first three layers,
# which MaxText never stacks, it has one stack of the layers at 128 and one of those at four.
_COMPRESS_RATIOS = [0, 0, 4, 128, 4, 128, 4]

_CONFIG = {
    "vocab_size": 112,
    "hidden_size": 48,
    "moe_intermediate_size": 26,
    "num_hidden_layers": len(_COMPRESS_RATIOS),
    "num_hash_layers": 3,
    "compress_ratios": _COMPRESS_RATIOS,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "qk_rope_head_dim": 12,
    "q_lora_rank": 18,
    "o_groups": 3,
    "o_lora_rank": 14,
    # A score is the sum over the heads of what is positive. With few heads it is often zero, and the implementations
    # choose differently among equal scores.
    "index_n_heads": 9,
    "index_head_dim": 16,
    "index_topk": 7,
    "sliding_window": 24,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "hc_mult": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

_SETTINGS = {
    "attention": "dot_product",  # the only kind of which MaxText has this model on a CPU, for its converter too
    "base_mlp_dim": _CONFIG["moe_intermediate_size"],
    "compress_ratios": str(_COMPRESS_RATIOS).replace(" ", ""),
    "first_num_hash_layers": _CONFIG["num_hash_layers"],
    "indexer_head_dim": _CONFIG["index_head_dim"],
    "indexer_n_heads": _CONFIG["index_n_heads"],
    "indexer_topk": _CONFIG["index_topk"],
    "mhc_expansion_rate": _CONFIG["hc_mult"],
    "o_groups": _CONFIG["o_groups"],
    "o_lora_rank": _CONFIG["o_lora_rank"],
}

# The text is longer than the 128 tokens that some layers compress to one.
CASES = (
    Case(
        "deepseek_v4",
        "deepseek4-284b",
        "deepseek_v4",
        _CONFIG,
        "float32",
        _SETTINGS,
        length=144,
        own_converter=("scanned", "unscanned"),
    ),
)

# Patterns of transformers' names, and what gives the published names, which `save_pretrained` does not write.
_PUBLISHED_NAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
    (r"\.mlp\b", ".ffn"),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
)


def published(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of transformers' model as they are published: other names, and each expert by itself."""
    result = {}
    for name, tensor in tensors.items():
        stem, separator, stacked = name.partition(".experts.")
        if not separator:
            result[_published_name(name)] = tensor
            continue
        parts = ("w1", "w3") if stacked == "gate_up_proj" else ("w2",)
        for expert, weights in enumerate(tensor):
            for part, weight in zip(parts, weights.chunk(len(parts)), strict=True):
                result[f"{_published_name(stem)}.experts.{expert}.{part}.weight"] = weight
    return result


def _published_name(name: str) -> str:
    """Returns the published name of one of transformers' tensors."""
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
