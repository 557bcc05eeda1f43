"""Qwen 2, 2.5, 3 and 3-MoE, and the models around Qwen 3 that see (3-VL, Weaver) and hear (3-Omni)."""

from dataclasses import dataclass

from slicecast.configs.families import blocks, qwen_vision
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable


@dataclass(frozen=True)
class _Variant:
    """What tells the architectures apart: the prefixes of names, and how experts and attention are stored."""

    prefix: str = "model."
    head: str = "lm_head"
    visual: str | None = None
    fused_experts: bool = False
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, str] | None = ("q_norm", "k_norm")


_VISION = _Variant("model.language_model.", visual="model.visual")
# Weaver's names have no prefixes.
_WEAVER = _Variant("", visual="", projections=("to_q", "to_k", "to_v", "to_out"), norms=("norm_q", "norm_k"))
_VARIANTS = {
    "Qwen2ForCausalLM": _Variant(norms=None),
    "Qwen3ForCausalLM": _Variant(),
    "Qwen3MoeForCausalLM": _Variant(),
    "Qwen3VLForConditionalGeneration": _VISION,
    "Qwen3VLMoeForConditionalGeneration": _Variant(_VISION.prefix, visual=_VISION.visual, fused_experts=True),
    "Qwen3OmniMoeForConditionalGeneration": _Variant("thinker.model.", "thinker.lm_head", "thinker.visual"),
    "WeaverForConditionalGeneration": _WEAVER,
    "WeaverOmniForConditionalGeneration": _WEAVER,
}
ARCHITECTURES = tuple(_VARIANTS)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Qwen checkpoint."""
    variant, omni = _VARIANTS[architecture], "Omni" in architecture and "Weaver" not in architecture
    outer = config.section("thinker_config") or config
    c = outer.section("text_config") or config
    c.refuse("use_sliding_window", False, why="MaxText's Qwen attends to all tokens.")
    c.refuse("mlp_only_layers", [], why="MaxText's Qwen has an expert block in every layer.")
    c.refuse("decoder_sparse_step", 1, why="MaxText's Qwen has an expert block in every layer.")
    table = RuleTable(blocks.sizes(c, options, **blocks.heads(c)))
    blocks.embedding(table, f"{variant.prefix}embed_tokens.weight")
    table.add(f"{variant.prefix}norm.weight", "norm", "decoder/decoder_norm/scale")
    tied = outer.flag("tie_word_embeddings", False)
    if not tied:
        blocks.output_layer(table, f"{variant.head}.weight")
    layers = c.integer("num_hidden_layers")
    layer = table.within(f"{variant.prefix}layers.{{layer}}", "decoder/{layers}", stacked("layers", layers))
    layer.add("input_layernorm.weight", "norm", "pre_self_attention_layer_norm/scale")
    layer.add("post_attention_layernorm.weight", "norm", "post_self_attention_layer_norm/scale")
    attention = layer.within("self_attn", "self_attention")
    blocks.attention(attention, biases=variant.norms is None, names=variant.projections)
    if variant.norms is not None:
        c.refuse("attention_bias", False, why="MaxText's Qwen 3 attention has no bias.")
        for name, leaf in zip(variant.norms, ("query_norm", "key_norm"), strict=True):
            attention.add(f"{name}.weight", "norm:kv", f"{leaf}/scale")
    experts = c.integer("num_experts") if "Moe" in architecture else 0
    if experts:
        _experts(c, layer.within("mlp", "moe_block"), experts, fused=variant.fused_experts)
    else:
        blocks.mlp(layer.within("mlp", "mlp", mlp=c.integer("intermediate_size")))
    ignores = [blocks.ROTARY_FREQUENCIES]
    if tied:
        ignores.append(Ignore(rf"{variant.head}\.weight", "config.json ties the output layer to the embedding"))
    if omni:
        ignores.append(Ignore(r"(talker|code2wav)\..*", "MaxText's model reads speech, and does not speak"))
    if variant.visual is not None and options.use_multimodal is not False:
        qwen_vision.add(outer, table, variant.visual, c.integer("hidden_size"), omni=omni)
    elif variant.visual:
        ignores.append(Ignore(r"(model|thinker)\.(visual|audio_tower)\..*", "--use_multimodal=false"))
    return Model(
        family="qwen",
        description=(
            f"{architecture}: {layers} layers, {f'{experts} experts, ' if experts else ''}"
            f"hidden {c.integer('hidden_size')}, vocabulary {c.integer('vocab_size')}"
        ),
        rules=table.rules,
        ignores=tuple(ignores),
        notes=tuple(blocks.vocabulary_notes(table)),
        # MaxText adds the vision tower's features to single layers.
        unscanned_only="" if variant.visual is None else "its vision features enter layer by layer",
    )


def _experts(c: HfConfig, table: RuleTable, count: int, *, fused: bool) -> None:
    table = table.within("", "", exp=count, mlp_moe=c.integer("moe_intermediate_size"))
    table.add("gate.weight", ":exp embed -> embed :exp", "gate/kernel")
    if fused:  # Qwen 3-VL has all experts of a layer in one tensor, in the order that MaxText has.
        for half, leaf in enumerate(("wi_0", "wi_1")):
            table.add("experts.gate_up_proj", f"exp embed_moe ({half}/2 mlp_moe)", leaf)
        table.add("experts.down_proj", "exp mlp_moe embed_moe", "wo")
    else:
        blocks.experts(table.within("experts.{expert}", ""), count)
