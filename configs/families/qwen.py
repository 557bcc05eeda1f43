"""Qwen 2, 2.5, 3 and 3-MoE, and the text part of Qwen 3-VL, Qwen 3-Omni and Weaver, which add a vision tower."""

from slicecast.configs.families import blocks, qwen_vision
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable

_TEXT = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_VISION = (
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "WeaverForConditionalGeneration",
    "WeaverOmniForConditionalGeneration",
)
_OMNI = ("Qwen3OmniMoeForConditionalGeneration",)
ARCHITECTURES = (*_TEXT, *_VISION, *_OMNI)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Qwen checkpoint."""
    outer = config.section("thinker_config") or config
    c = outer.section("text_config") or config
    multimodal = architecture not in _TEXT and options.use_multimodal is not False
    prefix, head = {_TEXT: ("model", "lm_head"), _VISION: ("model.language_model", "lm_head")}.get(
        next(names for names in (_TEXT, _VISION, _OMNI) if architecture in names),
        ("thinker.model", "thinker.lm_head"),
    )
    c.refuse("use_sliding_window", False, why="MaxText's Qwen attends to all tokens.")
    c.refuse("mlp_only_layers", [], why="MaxText's Qwen has an expert block in every layer.")
    c.refuse("decoder_sparse_step", 1, why="MaxText's Qwen has an expert block in every layer.")
    table = RuleTable(blocks.sizes(c, options, **blocks.heads(c)))
    blocks.embedding(table, f"{prefix}.embed_tokens.weight")
    table.add(f"{prefix}.norm.weight", "norm", "decoder/decoder_norm/scale")
    tied = (c if architecture in _TEXT else outer).flag("tie_word_embeddings", False)
    if not tied:
        blocks.output_layer(table, f"{head}.weight")
    layers = c.integer("num_hidden_layers")
    layer = table.within(f"{prefix}.layers.{{layer}}", "decoder/{layers}", stacked("layers", layers))
    layer.add("input_layernorm.weight", "norm", "pre_self_attention_layer_norm/scale")
    layer.add("post_attention_layernorm.weight", "norm", "post_self_attention_layer_norm/scale")
    attention = layer.within("self_attn", "self_attention")
    blocks.attention(attention, biases=architecture == "Qwen2ForCausalLM")
    if architecture != "Qwen2ForCausalLM":
        c.refuse("attention_bias", False, why="MaxText's Qwen 3 attention has no bias.")
        attention.add("q_norm.weight", "norm:kv", "query_norm/scale")
        attention.add("k_norm.weight", "norm:kv", "key_norm/scale")
    experts = c.integer("num_experts") if "Moe" in architecture else 0
    if experts:
        _experts(c, layer.within("mlp", "moe_block"), experts, fused=architecture in _VISION)
    else:
        blocks.mlp(layer.within("mlp", "mlp", mlp=c.integer("intermediate_size")))
    ignores = [blocks.ROTARY_FREQUENCIES]
    if tied:
        ignores.append(Ignore(rf"{head}\.weight", "config.json ties the output layer to the embedding"))
    if architecture in _OMNI:
        ignores.append(Ignore(r"(talker|code2wav)\..*", "MaxText's model reads speech, and does not speak"))
    if multimodal:
        qwen_vision.add(outer, table, c.integer("hidden_size"), omni=architecture in _OMNI)
    elif architecture not in _TEXT:
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
        unscanned_only="its vision features enter layer by layer" if architecture not in _TEXT else "",
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
