"""Qwen 2, 2.5, 3 and 3-MoE, and the models around Qwen 3 that see (3-VL, Weaver) and hear (3-Omni)."""

from dataclasses import dataclass, replace

from slicecast.configs.families import blocks, qwen_vision
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable


@dataclass(frozen=True)
class _Variant:
    """What tells the architectures apart: prefixes of names, what parts are called, and in which forms experts come."""

    prefix: str = "model."
    head: str = "lm_head"
    visual: str | None = None
    omni: bool = False
    experts: tuple[blocks.ExpertsForm, ...] = ()
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, str] | None = ("q_norm", "k_norm")


_VISION = _Variant("model.language_model.", visual="model.visual")
# Weaver's names have no prefixes.
_WEAVER = _Variant("", visual="", projections=("to_q", "to_k", "to_v", "to_out"), norms=("norm_q", "norm_k"))
_VARIANTS = {
    "Qwen2ForCausalLM": _Variant(norms=None),
    "Qwen3ForCausalLM": _Variant(),
    "Qwen3MoeForCausalLM": _Variant(experts=("separate", "fused")),
    "Qwen3VLForConditionalGeneration": _VISION,
    # Published with inputs first; transformers saves it the other way around, and quantized ones have single experts.
    "Qwen3VLMoeForConditionalGeneration": replace(_VISION, experts=("fused, inputs first", "fused", "separate")),
    "Qwen3OmniMoeForConditionalGeneration": _Variant(
        "thinker.model.", "thinker.lm_head", "thinker.visual", omni=True, experts=("separate", "fused")
    ),
    "WeaverForConditionalGeneration": _WEAVER,
    "WeaverOmniForConditionalGeneration": _WEAVER,
}
ARCHITECTURES = tuple(_VARIANTS)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Qwen checkpoint."""
    variant = _VARIANTS[architecture]
    outer = config.section("thinker_config") or config
    c = outer.section("text_config") or config
    # transformers 5 saves the number of experts under another name than the published one.
    c = c.with_defaults({"num_experts": c.values.get("num_local_experts")})
    c.refuse("use_sliding_window", False, why="MaxText's Qwen attends to all tokens.")
    c.refuse("mlp_only_layers", [], why="MaxText's Qwen has an expert block in every layer.")
    c.refuse("decoder_sparse_step", 1, why="MaxText's Qwen has an expert block in every layer.")
    if variant.norms is not None:
        c.refuse("attention_bias", False, why="MaxText's Qwen 3 attention has no bias.")
    experts = c.integer("num_experts") if variant.experts else 0
    tied = outer.flag("tie_word_embeddings", False)
    multimodal = variant.visual is not None and options.use_multimodal is not False
    tables = [
        _table(outer, c, variant, options, form, tied=tied, multimodal=multimodal)
        for form in variant.experts or ("separate",)
    ]
    ignores = []
    if tied:
        ignores.append(blocks.tied_output(rf"{variant.head}\.weight"))
    if variant.omni:
        ignores.append(Ignore(r"(talker|code2wav)\..*", "MaxText's model reads speech, and does not speak"))
    if variant.visual and not multimodal:
        ignores.append(Ignore(r"(model|thinker)\.(visual|audio_tower)\..*", "--use_multimodal=false"))
    # MaxText adds the vision tower's features to single layers.
    why = "" if variant.visual is None else "its vision features enter layer by layer"
    return blocks.model("qwen", architecture, c, *tables, experts=experts, ignores=ignores, unscanned_only=why)


def _table(
    outer: HfConfig,
    c: HfConfig,
    variant: _Variant,
    options: ModelOptions,
    form: blocks.ExpertsForm,
    *,
    tied: bool,
    multimodal: bool,
) -> RuleTable:
    table = RuleTable(blocks.sizes(c, options, **blocks.heads(c)))
    blocks.ends(table, variant.prefix, None if tied else f"{variant.head}.weight")
    stack = stacked("layers", c.integer("num_hidden_layers"))
    layer = table.within(f"{variant.prefix}layers.{{layer}}", "decoder/{layers}", stack)
    blocks.layer_norms(layer)
    attention = layer.within("self_attn", "self_attention")
    blocks.attention(attention, biases=variant.norms is None, names=variant.projections)
    for name, leaf in zip(variant.norms or (), ("query_norm", "key_norm"), strict=False):
        attention.add(f"{name}.weight", "norm:kv", f"{leaf}/scale")
    if variant.experts:
        sizes = {"exp": c.integer("num_experts"), "mlp_moe": c.integer("moe_intermediate_size")}
        moe = layer.within("mlp", "moe_block", None, **sizes)
        moe.add("gate.weight", ":exp embed -> embed :exp", "gate/kernel")
        blocks.experts_in_form(moe, form)
    else:
        blocks.mlp(layer.within("mlp", "mlp", mlp=c.integer("intermediate_size")))
    if multimodal and variant.visual is not None:
        qwen_vision.add(outer, table, variant.visual, c.integer("hidden_size"), omni=variant.omni)
    return table
