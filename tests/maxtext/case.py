"""One tiny model of the MaxText oracle, and how MaxText is told about it. Nothing heavy is imported here."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Layout = Literal["scanned", "unscanned"]
Program = Literal["slicecast", "maxtext"]
SaveDtype = Literal["bfloat16", "float32"]

SAVE_DTYPES: tuple[SaveDtype, ...] = ("bfloat16", "float32")

# What MaxText calls the sizes of a transformers config. Everything else comes from MaxText's file of the model.
_MAXTEXT_NAMES = {
    "attention_chunk_size": "chunk_attn_window_size",
    "first_k_dense_replace": "first_num_dense_layers",
    "global_head_dim": "global_head_dim",
    "head_dim": "head_dim",
    "hidden_size": "base_emb_dim",
    "hidden_size_per_layer_input": "hidden_size_per_layer_input",
    "intermediate_size": "base_mlp_dim",
    "kv_lora_rank": "kv_lora_rank",
    "moe_intermediate_size": "base_moe_mlp_dim",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "shared_experts",
    "num_attention_heads": "base_num_query_heads",
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_global_key_value_heads": "global_num_kv_heads",
    "num_local_experts": "num_experts",
    "num_hidden_layers": "base_num_decoder_layers",
    "num_key_value_heads": "base_num_kv_heads",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "num_nextn_predict_layers": "mtp_num_layers",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "sliding_window": "sliding_window_size",
    "top_k_experts": "num_experts_per_tok",
    "v_head_dim": "v_head_dim",
    "vocab_size": "vocab_size",
    "vocab_size_per_layer_input": "vocab_size_per_layer_input",
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
      save_dtype: of the converted checkpoint that MaxText computes with.
      quantization: how weights are stored: `int4`, the routed experts as in Kimi-K2-Thinking; `fp8`, all projections in
        blocks of 128 by 128 as in DeepSeek-V3; `mxfp4`, the experts as in gpt-oss.
      multimodal: whether the model sits in the vision wrapper of Kimi-K2.5 and Kimi-K2.6, unknown to transformers.
      wrapper: for the text part of a multimodal model, the other arguments of the config that `architecture` names.
      layouts: those that MaxText has for this model.
      own_converter: the layouts that MaxText's own converter can write.
      length: of the text, in tokens.
    """

    name: str
    model_name: str
    architecture: str
    config: Mapping[str, Any]
    dtype: str
    maxtext: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    save_dtype: SaveDtype = "float32"
    quantization: Literal["int4", "fp8", "mxfp4"] | None = None
    multimodal: bool = False
    wrapper: Mapping[str, Any] | None = None
    layouts: tuple[Layout, ...] = ("scanned", "unscanned")
    own_converter: tuple[Layout, ...] = ()
    length: int = 16

    @property
    def tokens(self) -> int:
        """How many tokens the checkpoint and MaxText's model both have."""
        source: int = self.config["vocab_size"]
        return min(source, self.maxtext.get("vocab_size", source))

    @property
    def predicts_more(self) -> bool:
        """Whether the checkpoint has a layer for multi-token prediction, which predicts the token after the next."""
        return self.config.get("num_nextn_predict_layers", 0) > 0

    @property
    def sees(self) -> bool:
        """Whether MaxText's model is asked to have a vision encoder, which it does not have by default."""
        return bool(self.maxtext.get("use_multimodal", False))

    def maxtext_settings(self, layout: Layout) -> dict[str, Any]:
        """Returns the settings of MaxText's config that describe this model."""
        sizes = {_MAXTEXT_NAMES[key]: value or 0 for key, value in self.config.items() if key in _MAXTEXT_NAMES}
        program = {"model_name": self.model_name, "scan_layers": layout == "scanned", "max_target_length": self.length}
        return program | sizes | self.maxtext


def output(folder: Path, program: Program, save_dtype: SaveDtype, layout: Layout) -> Path:
    """Returns the `base_output_directory` of a conversion of the case that has this folder."""
    return folder / program / save_dtype / layout


def items(folder: Path, program: Program, save_dtype: SaveDtype, layout: Layout) -> Path:
    """Returns the converted checkpoint."""
    return output(folder, program, save_dtype, layout) / "0" / "items"
