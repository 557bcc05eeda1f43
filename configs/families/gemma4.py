"""Google's Gemma 4: dense, with experts, and the small models E2B and E4B.

Layers with a sliding window take turns with one that attends to everything, which has other heads. Norms are published
as what they multiply with.
"""

import re
from collections.abc import Iterator

from slicecast.configs.families import blocks, gemma4_vision
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Scale
from slicecast.convert.mapping.rules import Ignore, Layers, Model, ModelOptions, nested_cycle
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM")

# The larger models.
_CYCLE = ("sliding_attention",) * 5 + ("full_attention",)

_SMALL_VISION = "MaxText's Gemma 4 E2B and E4B have no vision encoder"


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Gemma 4 checkpoint."""
    c = config.section("text_config") or config
    c.refuse("attention_bias", False, why="MaxText's Gemma attention has no bias.")
    config.refuse("tie_word_embeddings", True, why="MaxText's Gemma computes logits with the embedding.")
    prefix = "model.language_model" if architecture == ARCHITECTURES[0] else "model"
    layers, hidden = c.integer("num_hidden_layers"), c.integer("hidden_size")
    small = bool(c.integer("hidden_size_per_layer_input", 0, least=0))
    experts = c.integer("num_experts") if c.flag("enable_moe_block", False) else 0
    table = RuleTable(_sizes(c, options))
    blocks.embedding(table, f"{prefix}.embed_tokens.weight", Scale(hidden**0.5))
    table.add(f"{prefix}.norm.weight", "norm", "decoder/decoder_norm/scale")
    if small:
        _per_layer_embedding(table, prefix)
    for kind, is_global in _small_layers(c, layers) if small else _layers(c, layers):
        layer = table.within(f"{prefix}.layers.{{layer}}", "decoder/{layers}", kind)
        _norms(layer)
        _attention(c, layer, is_global=is_global, shares_kv=small and kind.start >= _first_shared(c, layers))
        if experts:
            _experts(layer)
        else:
            # Layers that reuse keys and values have a feed-forward block of twice the size.
            wide = kind.start >= _first_shared(c, layers) and c.flag("use_double_wide_mlp", False)
            blocks.mlp(layer.within("mlp", "mlp", mlp=c.integer("intermediate_size") * (2 if wide else 1)))
        if small:
            _per_layer_input(layer)
    ignores = list(_ignores(c, prefix, layers))
    if options.use_multimodal and small:
        raise ConfigError(f"--use_multimodal: {_SMALL_VISION}.")
    if options.use_multimodal:
        gemma4_vision.add(config.require_section("vision_config"), table, hidden)
    else:
        why = _SMALL_VISION if small else "vision needs --use_multimodal"
        ignores.append(Ignore(r"model\.(vision_tower|embed_vision)\..*", why))
    why = "its layers share keys and values" if small else ""
    return blocks.model("gemma4", architecture, c, table, experts=experts, ignores=ignores, unscanned_only=why)


def _ignores(c: HfConfig, prefix: str, layers: int) -> Iterator[Ignore]:
    for layer in range(_first_shared(c, layers), layers):
        yield Ignore(
            rf"{re.escape(prefix)}\.layers\.{layer}\.self_attn\.(k_proj|v_proj|k_norm)\.weight",
            "layers that use the keys and values of another layer have none of their own",
        )
    yield blocks.tied_output(r"lm_head\.weight")
    yield Ignore(r"model\.(audio_tower|embed_audio)\..*", "MaxText's model does not hear")


def _sizes(c: HfConfig, options: ModelOptions) -> dict[str, int]:
    layers, per_layer = c.integer("num_hidden_layers"), c.integer("hidden_size_per_layer_input", 0, least=0)
    heads = c.integer("num_attention_heads")
    return blocks.sizes(
        c,
        options,
        q_heads=heads,
        heads=heads,
        mlp=c.integer("intermediate_size"),
        mlp_moe=c.integer("moe_intermediate_size", 1),
        exp=c.integer("num_experts", 1),
        per_layer=per_layer,
        all_layers=layers * per_layer,
        tokens_per_layer=c.integer("vocab_size_per_layer_input", c.integer("vocab_size")),
    )


def _layers(c: HfConfig, layers: int) -> list[tuple[Layers, bool]]:
    """MaxText scans over cycles, and over the layers with a sliding window in each."""
    blocks.take_turns(c, _CYCLE)
    local, last = nested_cycle(layers, len(_CYCLE), "scanned_blocks")
    return [(local, False), (last, True)]


def _small_layers(c: HfConfig, layers: int) -> list[tuple[Layers, bool]]:
    """The small models have no scanned form: each layer stands alone."""
    kinds = c.names("layer_types", layers)
    return [(Layers(layer, (), f"layers_{layer}"), kinds[layer] == "full_attention") for layer in range(layers)]


def _first_shared(c: HfConfig, layers: int) -> int:
    """The first of the last layers, which have no keys and values of their own."""
    return layers - c.integer("num_kv_shared_layers", 0, least=0)


def _per_layer_embedding(table: RuleTable, prefix: str) -> None:
    embedder = table.within(prefix, "decoder/per_layer_embedder")
    of_tokens = "vocab:tokens_per_layer embed_vocab:all_layers"
    embedder.add("embed_tokens_per_layer.weight", of_tokens, "embed_tokens_per_layer")
    of_hidden = "mlp:all_layers embed -> embed mlp:all_layers"
    embedder.add("per_layer_model_projection.weight", of_hidden, "per_layer_model_projection/kernel")
    embedder.add("per_layer_projection_norm.weight", "norm:per_layer", "per_layer_projection_norm/scale")


def _per_layer_input(layer: RuleTable) -> None:
    down, up = "mlp:per_layer embed -> embed mlp:per_layer", "embed mlp:per_layer -> mlp:per_layer embed"
    layer.add("per_layer_input_gate.weight", down, "per_layer_input_gate/kernel")
    layer.add("per_layer_projection.weight", up, "per_layer_projection/kernel")
    layer.add("post_per_layer_input_norm.weight", "norm", "post_per_layer_input_norm/scale")


def _norms(layer: RuleTable) -> None:
    layer.add("input_layernorm.weight", "norm", "pre_self_attention_norm/scale")
    layer.add("post_attention_layernorm.weight", "norm", "post_self_attention_norm/scale")
    layer.add("pre_feedforward_layernorm.weight", "norm", "pre_ffw_norm/scale")
    layer.add("post_feedforward_layernorm.weight", "norm", "post_ffw_norm/scale")
    layer.add("layer_scalar", ":1", "layer_scalar")


def _attention(c: HfConfig, layer: RuleTable, *, is_global: bool, shares_kv: bool) -> None:
    head_dim, kv_heads = c.integer("head_dim"), c.integer("num_key_value_heads")
    keys_are_values = is_global and c.flag("attention_k_eq_v", False)
    by_layer = c.section("per_layer_config")
    if is_global and by_layer is not None and by_layer.values:
        # As transformers 5 writes it: what is other than in all layers, by the number of each global layer.
        special = by_layer.require_section(next(iter(by_layer.values)))
        head_dim, kv_heads = special.integer("head_dim", head_dim), special.integer("num_key_value_heads", kv_heads)
    elif is_global:
        head_dim = c.integer("global_head_dim", head_dim)
        kv_heads = c.integer("num_global_key_value_heads", kv_heads) if keys_are_values else kv_heads
    attention = layer.within("self_attn", "self_attention", kv=head_dim, kv_head_dim=head_dim, kv_heads=kv_heads)
    blocks.attention(attention, keys=not shares_kv, values=not (keys_are_values or shares_kv))
    attention.add("q_norm.weight", "norm:kv", "query_norm/scale")
    if not shares_kv:
        attention.add("k_norm.weight", "norm:kv", "key_norm/scale")


def _experts(layer: RuleTable) -> None:
    """A dense block beside routed experts; MaxText calls it their shared expert."""
    mlp = layer.within("", "mlp")
    mlp.add("pre_feedforward_layernorm_2.weight", "norm", "pre_feedforward_layernorm_2/scale")
    mlp.add("post_feedforward_layernorm_1.weight", "norm", "post_feedforward_layernorm_1/scale")
    mlp.add("post_feedforward_layernorm_2.weight", "norm", "post_feedforward_layernorm_2/scale")
    mlp.add("router.scale", "embed", "pre_forward_scale_2")
    routed = mlp.within("", "moe_block/MoeBlock_0")
    routed.add("router.proj.weight", ":exp embed_router -> embed_router :exp", "gate/kernel")
    routed.add("router.per_expert_scale", "exp", "per_expert_scale")
    blocks.fused_experts(routed.within("experts", ""))
    blocks.mlp(layer.within("mlp", "mlp/moe_block/shared_experts"))
