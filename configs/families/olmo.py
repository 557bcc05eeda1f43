"""Ai2's OLMo 3: norms after attention and feed-forward, three layers with a sliding window, then one without."""

from slicecast.configs.families import blocks
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Model, ModelOptions, cycle
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("Olmo3ForCausalLM",)

_CYCLE = ("sliding_attention",) * 3 + ("full_attention",)


def model(c: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for an OLMo 3 checkpoint."""
    layers = c.integer("num_hidden_layers")
    if layers % len(_CYCLE):
        raise ConfigError(
            f"{c.where}: field 'num_hidden_layers' is {layers}, which is not supported: MaxText's OLMo 3 is made of "
            f"cycles of {len(_CYCLE)} layers."
        )
    c.refuse("layer_types", list(_CYCLE) * (layers // len(_CYCLE)), why=f"MaxText repeats {', '.join(_CYCLE)}.")
    c.refuse("attention_bias", False, why="MaxText's OLMo 3 attention has no bias.")
    c.refuse("tie_word_embeddings", False, why="MaxText's OLMo 3 has an output layer of its own.")
    heads = blocks.heads(c)
    table = RuleTable(
        blocks.sizes(
            c,
            options,
            **heads,
            mlp=c.integer("intermediate_size"),
            queries=heads["q_heads"] * heads["kv"],
            keys=heads["kv_heads"] * heads["kv"],
        )
    )
    blocks.embedding(table)
    table.add("model.norm.weight", "norm", "decoder/decoder_norm/scale")
    blocks.output_layer(table)
    for kind in cycle(layers, len(_CYCLE), "layers/layers_{}"):
        layer = table.within("model.layers.{layer}", "decoder/{layers}", kind)
        layer.add("post_attention_layernorm.weight", "norm", "post_self_attention_layer_norm/scale")
        layer.add("post_feedforward_layernorm.weight", "norm", "post_mlp_layer_norm/scale")
        attention = layer.within("self_attn", "attention")
        blocks.attention(attention)
        # These norms span all heads.
        attention.add("q_norm.weight", "norm:queries", "query_norm/scale")
        attention.add("k_norm.weight", "norm:keys", "key_norm/scale")
        blocks.mlp(layer.within("mlp", "mlp"))
    return Model(
        family="olmo",
        description=(
            f"{architecture}: {layers} layers, hidden {c.integer('hidden_size')}, vocabulary {c.integer('vocab_size')}"
        ),
        rules=table.rules,
        ignores=(blocks.ROTARY_FREQUENCIES,),
        notes=tuple(blocks.vocabulary_notes(table)),
    )
