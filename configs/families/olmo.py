"""Ai2's OLMo 3: norms after attention and feed-forward, three layers with a sliding window, then one without."""

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Model, ModelOptions, cycle
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("Olmo3ForCausalLM",)

_CYCLE = ("sliding_attention",) * 3 + ("full_attention",)


def model(c: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for an OLMo 3 checkpoint."""
    layers = c.integer("num_hidden_layers")
    blocks.take_turns(c, _CYCLE)
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
    blocks.ends(table)
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
    return blocks.model("olmo", architecture, c, table)
