"""Mistral AI's Mixtral: Mistral's attention, and experts in every layer."""

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Scale
from slicecast.convert.mapping.rules import Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("MixtralForCausalLM",)


def model(c: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Mixtral checkpoint."""
    c.refuse("tie_word_embeddings", False, why="MaxText's Mixtral has an output layer of its own.")
    layers, experts = c.integer("num_hidden_layers"), c.integer("num_local_experts")
    table = RuleTable(blocks.sizes(c, options, **blocks.heads(c), mlp_moe=c.integer("intermediate_size"), exp=experts))
    blocks.ends(table)
    layer = table.within("model.layers.{layer}", "decoder/{layers}", stacked("layers", layers))
    blocks.layer_norms(layer)
    # As for Llama, MaxText's checkpoints hold queries multiplied by 1 / sqrt(head_dim).
    blocks.attention(layer.within("self_attn", "self_attention"), query=(Scale(table.sizes["kv"] ** -0.5),))
    moe = layer.within("block_sparse_moe", "MoeBlock_0")
    moe.add("gate.weight", ":exp embed -> embed :exp", "gate/kernel")
    blocks.experts(moe.within("experts.{expert}", ""), experts, ("w1", "w3", "w2"))
    return blocks.model("mixtral", architecture, c, table, experts=experts)
