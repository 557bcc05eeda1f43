"""Tiny models of the Qwen family."""

from collections.abc import Mapping
from typing import Any

from case import Case

# What MaxText calls the sizes of Qwen's gated delta networks.
_DELTA_NET_NAMES = {
    "linear_conv_kernel_dim": "gdn_conv_kernel_dim",
    "linear_key_head_dim": "gdn_key_head_dim",
    "linear_num_key_heads": "gdn_num_key_heads",
    "linear_num_value_heads": "gdn_num_value_heads",
    "linear_value_head_dim": "gdn_value_head_dim",
}

# What MaxText calls the sizes of the vision tower.
_VISION_NAMES = {
    "deepstack_visual_indexes": "deepstack_visual_indexes_for_vit",
    "depth": "num_hidden_layers_for_vit",
    "hidden_size": "hidden_size_for_vit",
    "in_channels": "num_channels_for_vit",
    "intermediate_size": "intermediate_size_for_vit",
    "num_heads": "num_attention_heads_for_vit",
    "num_position_embeddings": "num_position_embeddings_for_vit",
    "out_hidden_size": "out_hidden_size_for_vit",
    "patch_size": "patch_size_for_vit",
    "spatial_merge_size": "spatial_merge_size_for_vit",
    "temporal_patch_size": "temporal_patch_size_for_vit",
}


def _qwen(theta: float, **changes: Any) -> dict[str, Any]:
    """Returns the config of a dense Qwen 2.5 or Qwen 3."""
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
    return sizes | {"rms_norm_eps": 1e-6, "rope_parameters": rope, "tie_word_embeddings": False} | changes


def _mixture(theta: float, **changes: Any) -> dict[str, Any]:
    """Returns the config of a Qwen 3 with experts in every layer."""
    experts = {"moe_intermediate_size": 26, "num_experts": 10, "num_experts_per_tok": 3, "norm_topk_prob": True}
    return _qwen(theta) | experts | changes


def _hybrid(**changes: Any) -> dict[str, Any]:
    """Returns the config of a Qwen 3-Next: two cycles of three gated delta networks and one gated attention."""
    sizes = {
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "shared_expert_intermediate_size": 26,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 14,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 18,
    }
    return _mixture(10_000_000.0) | sizes | {"partial_rotary_factor": 0.25} | changes


# Not computed with: only the leaves of the vision tower are compared.
_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": _qwen(0)["hidden_size"],
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}

# The text is longer than a chunk of the recurrence, so that its state is carried over.
_HYBRID_SETTINGS = {"gdn_chunk_size": 8} | {name: _hybrid()[key] for key, name in _DELTA_NET_NAMES.items()}

_VISION_SETTINGS = {name: str(_VISION[key]).replace(" ", "") for key, name in _VISION_NAMES.items()} | {
    "image_size_for_vit": 24,
    "mrope_section": "[2,2,2]",
}

# Of a tower whose features enter the text as tokens only.
_PLAIN_VISION_SETTINGS = {name: value for name, value in _VISION_SETTINGS.items() if "deepstack" not in name}


_AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 44,
    "d_model": 24,
    "max_source_positions": 60,
    "n_window": 5,
    "output_dim": _qwen(0)["hidden_size"],
    "n_window_infer": 40,
    "conv_chunksize": 50,
    "downsample_hidden_size": 9,
}

_AUDIO_SETTINGS = {f"{name}_for_audio": value for name, value in _AUDIO.items()}


def _multimodal_rope(theta: float) -> dict[str, Any]:
    """Returns RoPE whose frequencies are shared out between the three axes of a position."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": [2, 2, 2], "mrope_interleaved": True}


CASES = (
    Case("qwen2_5", "qwen2.5-7b", "qwen2", _qwen(1_000_000.0), "bfloat16", own_converter=("scanned", "unscanned")),
    Case("qwen3", "qwen3-8b", "qwen3", _qwen(1_000_000.0), "bfloat16", own_converter=("scanned", "unscanned")),
    Case(
        "qwen3_tied",
        "qwen3-4b",
        "qwen3",
        _qwen(1_000_000.0, tie_word_embeddings=True),
        "bfloat16",
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "qwen3_moe",
        "qwen3-30b-a3b",
        "qwen3_moe",
        _mixture(10_000_000.0),
        "bfloat16",
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "qwen3_next",
        "qwen3-next-80b-a3b",
        "qwen3_next",
        _hybrid(),
        "bfloat16",
        _HYBRID_SETTINGS,
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "qwen3_5",
        "qwen3.5-35b-a3b",
        "qwen3_5_moe",
        _hybrid(),
        "bfloat16",
        _HYBRID_SETTINGS | _PLAIN_VISION_SETTINGS | {"mrope_section": "[1,1,1]", "use_multimodal": True},
        wrapper={"vision_config": {key: value for key, value in _VISION.items() if "deepstack" not in key}},
        own_converter=("scanned", "unscanned"),
    ),
    Case(
        "qwen3_vl",
        "qwen3-vl-2b",
        "qwen3_vl",
        _qwen(5_000_000.0, rope_parameters=_multimodal_rope(5_000_000.0), tie_word_embeddings=True),
        "bfloat16",
        _VISION_SETTINGS,
        wrapper={"vision_config": _VISION, "tie_word_embeddings": True},
        layouts=("unscanned",),
        own_converter=("unscanned",),
    ),
    Case(
        "qwen3_vl_moe",
        "qwen3-vl-30b-a3b",
        "qwen3_vl_moe",
        _mixture(5_000_000.0, rope_parameters=_multimodal_rope(5_000_000.0)),
        "bfloat16",
        _VISION_SETTINGS,
        wrapper={"vision_config": _VISION},
        layouts=("unscanned",),
        own_converter=("unscanned",),
    ),
    Case(
        "qwen3_omni",
        "qwen3-omni-30b-a3b",
        "qwen3_omni_moe",
        _mixture(1_000_000.0, rope_parameters=_multimodal_rope(1_000_000.0)),
        "bfloat16",
        _VISION_SETTINGS | _AUDIO_SETTINGS,
        wrapper={"vision_config": _VISION, "audio_config": _AUDIO},
        layouts=("unscanned",),
        own_converter=("unscanned",),
    ),
)


def inputs_first(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a Qwen 3-VL with experts as they are published: the experts' inputs before the outputs."""
    return {name: tensor.swapaxes(1, 2) if ".experts." in name else tensor for name, tensor in tensors.items()}
