"""OpenAI's gpt-oss.

Grouped-query attention with biases and sinks, sliding and full in turns, and experts in every layer. The experts of a
layer are one tensor, and so are their gate and up projections, column by column: even ones gate, odd ones up.
"""

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Model, ModelOptions, cycle
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("GptOssForCausalLM",)

# The kinds of layers that take turns. MaxText scans over pairs of them.
_CYCLE = ("sliding_attention", "full_attention")


def model(c: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a gpt-oss checkpoint."""
    layers = c.integer("num_hidden_layers")
    blocks.take_turns(c, _CYCLE)
    c.refuse("attention_bias", True, why="MaxText's gpt-oss attention has biases.")
    c.refuse("tie_word_embeddings", False, why="MaxText's gpt-oss has an output layer of its own.")
    experts, intermediate = c.integer("num_local_experts"), c.integer("intermediate_size")
    sizes = blocks.sizes(c, options, **blocks.heads(c), exp=experts, mlp_moe=intermediate, activation_mlp=intermediate)
    table = RuleTable(sizes)
    blocks.ends(table)
    for kind in cycle(layers, len(_CYCLE), "layers/layers_{}"):
        layer = table.within("model.layers.{layer}", "decoder/{layers}", kind)
        blocks.layer_norms(layer)
        attention = layer.within("self_attn", "GptOssAttention")
        blocks.attention(attention, biases=True)
        attention.add("o_proj.bias", "embed_attn", "out/bias")
        attention.add("sinks", ":q_heads", "sinks")
        mlp = layer.within("mlp", "GptOssMlp")
        mlp.add("router.weight", ":exp embed -> embed :exp", "gate/kernel")
        mlp.add("router.bias", ":exp", "gate/bias")
        for half, leaf in enumerate(("wi_0", "wi_1")):
            mlp.add("experts.gate_up_proj", f"exp embed_moe (mlp_moe {half}/2)", leaf)
            mlp.add("experts.gate_up_proj_bias", f"exp (activation_mlp {half}/2)", f"{leaf}_bias")
        mlp.add("experts.down_proj", "exp mlp_moe embed_moe", "wo")
        mlp.add("experts.down_proj_bias", "exp activation_embed", "wo_bias")
    return blocks.model("gpt_oss", architecture, c, table, experts=experts)
