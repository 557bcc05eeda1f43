"""The tiny models of the MaxText oracle: one description each, shared by the three environments that need it.

`make_sources.py` builds the transformers model (test environment), `scripts/test_maxtext.sh` converts its checkpoint,
and `test_logits.py` runs the result in MaxText (MaxText environment). Nothing heavy is imported here.

Within a model, all sizes that could be confused with one another differ (heads, head dims, ranks, experts, layers of a
stack, widths), so a transposed or misplaced axis cannot have the right shape. Head dims are not powers of four, so the
query scale `head_dim ** -0.5` is not a power of two and its rounding shows. RoPE, norm epsilon, limits of activations
and router settings are those of the real models, because MaxText takes them from its own model files.

    python cases.py     prints one line for each case: its name, MaxText's name of the model, the dtype to save
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

TOKENS = 16

# What MaxText calls the sizes of a transformers config. Everything else comes from MaxText's file of the model.
_MAXTEXT_NAMES = {
    "first_k_dense_replace": "first_num_dense_layers",
    "head_dim": "head_dim",
    "hidden_size": "base_emb_dim",
    "intermediate_size": "base_mlp_dim",
    "kv_lora_rank": "kv_lora_rank",
    "moe_intermediate_size": "base_moe_mlp_dim",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "shared_experts",
    "num_attention_heads": "base_num_query_heads",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_local_experts": "num_experts",
    "num_hidden_layers": "base_num_decoder_layers",
    "num_key_value_heads": "base_num_kv_heads",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "sliding_window": "sliding_window_size",
    "v_head_dim": "v_head_dim",
    "vocab_size": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
      name: the case's name, and the name of its folder.
      model_name: the MaxText model whose layout and settings it has, at another size.
      architecture: transformers' `model_type`.
      config: arguments of transformers' config.
      dtype: of the source checkpoint's weights.
      maxtext: settings that MaxText needs beside the sizes.
      save_dtype: of the converted checkpoint.
      quantization: how weights are stored: `int4`, the routed experts as in Kimi-K2-Thinking; `fp8`, all projections in
        blocks of 128 by 128 as in DeepSeek-V3; `mxfp4`, the experts as in gpt-oss.
      multimodal: whether the model sits in the vision wrapper of Kimi-K2.5 and Kimi-K2.6.
    """

    name: str
    model_name: str
    architecture: str
    config: Mapping[str, Any]
    dtype: str
    maxtext: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    save_dtype: str = "float32"
    quantization: Literal["int4", "fp8", "mxfp4"] | None = None
    multimodal: bool = False

    def maxtext_settings(self, scan_layers: bool) -> list[str]:
        """Returns the `key=value` arguments of MaxText's config that describe this model."""
        sizes = {_MAXTEXT_NAMES[key]: value or 0 for key, value in self.config.items() if key in _MAXTEXT_NAMES}
        settings = {"model_name": self.model_name, "scan_layers": scan_layers, **sizes, **self.maxtext}
        return [f"{key}={value}" for key, value in settings.items()]


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

# MaxText has another name for the width of experts, even in a model without other layers.
_GPT_OSS_WIDTH = {"base_moe_mlp_dim": _gpt_oss()["intermediate_size"]}

CASES = (
    # MaxText rotates interleaved pairs for llama3.1 and half-split pairs, as transformers does, for all other names.
    Case("llama31", "llama3.1-8b", "llama", _LLAMA31, "bfloat16"),
    Case("llama31_plain", "llama3.1-8b", "llama", _llama(500_000.0, 1e-5), "float32", {"rope_use_scale": False}),
    Case("llama3", "llama3-8b", "llama", _llama(500_000.0, 1e-5), "bfloat16"),
    Case("llama2", "llama2-7b", "llama", _llama(10_000.0, 1e-5, num_key_value_heads=4), "float32"),
    Case("mistral", "mistral-7b", "mistral", _llama(1_000_000.0, 1e-5, sliding_window=None), "bfloat16"),
    Case("deepseek3", "deepseek3-671b", "deepseek_v3", _DEEPSEEK3, "float32"),
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
    ),
    Case("kimi_int4", "kimi-k2-1t", "deepseek_v3", _kimi(), "bfloat16", quantization="int4"),
    Case("kimi26_int4", "kimi-k2-1t", "deepseek_v3", _kimi(), "bfloat16", quantization="int4", multimodal=True),
    # Lossless in bfloat16 too.
    Case("gpt_oss", "gpt-oss-20b", "gpt_oss", _gpt_oss(), "bfloat16", _GPT_OSS_WIDTH, save_dtype="bfloat16"),
    Case("gpt_oss_mxfp4", "gpt-oss-120b", "gpt_oss", _gpt_oss(), "bfloat16", _GPT_OSS_WIDTH, quantization="mxfp4"),
)


if __name__ == "__main__":
    for case in CASES:
        print(case.name, case.model_name, case.save_dtype)
