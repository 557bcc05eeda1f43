"""Meta's Llama 4, Scout and Maverick: layers with experts, alone or in turns with dense ones."""

from slicecast.configs.families import blocks, llama4_vision
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Model, ModelOptions, cycle
from slicecast.convert.mapping.table import RuleTable

_MULTIMODAL = "Llama4ForConditionalGeneration"
ARCHITECTURES = (_MULTIMODAL, "Llama4ForCausalLM")

# Every fourth layer has no rotary embedding; MaxText scans over the cycle.
_CYCLE = 4


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Llama 4 checkpoint."""
    c = config.section("text_config") or config
    prefix = "language_model." if architecture == _MULTIMODAL else ""
    layers, experts, step = (
        c.integer("num_hidden_layers"), c.integer("num_local_experts"), c.integer("interleave_moe_layer_step")
    )  # fmt: skip
    if layers % _CYCLE or _CYCLE % step:
        raise ConfigError(
            f"{c.where}: {layers} layers with experts in every layer of {step} are not supported: MaxText's Llama 4 is "
            f"made of cycles of {_CYCLE} layers."
        )
    c.refuse("attention_bias", False, why="MaxText's Llama attention has no bias.")
    c.refuse("tie_word_embeddings", False, why="MaxText's Llama 4 has an output layer of its own.")
    sizes = blocks.sizes(
        c, options, **blocks.heads(c), mlp_moe=c.integer("intermediate_size"), mlp=c.integer("intermediate_size"),
        exp=experts, dense=c.integer("intermediate_size_mlp", c.integer("intermediate_size")),
    )  # fmt: skip
    table = RuleTable(sizes)
    blocks.ends(table, f"{prefix}model.", f"{prefix}lm_head.weight")
    for place, kind in enumerate(cycle(layers, _CYCLE, "layers/layers_{}")):
        layer = table.within(f"{prefix}model.layers.{{layer}}", "decoder/{layers}", kind)
        blocks.layer_norms(layer)
        blocks.attention(layer.within("self_attn", "self_attention"))
        if (place + 1) % step:
            blocks.mlp(layer.within("feed_forward", "mlp", mlp=sizes["dense"]))
        else:
            _experts(layer.within("feed_forward", "Llama4MoEBlock_0"))
    ignores = []
    if options.use_multimodal:
        llama4_vision.add(config.require_section("vision_config"), table, c.integer("hidden_size"))
    else:
        ignores.append(Ignore(r"(vision_model|multi_modal_projector)\..*", "vision needs --use_multimodal"))
    return blocks.model("llama4", architecture, c, table, experts=experts, ignores=ignores)


def _experts(table: RuleTable) -> None:
    table.add("router.weight", ":exp embed_router -> embed_router :exp", "MoeBlock_0/gate/kernel")
    blocks.fused_experts_inputs_first(table.within("experts", "MoeBlock_0"))
    blocks.mlp(table.within("shared_expert", "shared_experts"))
