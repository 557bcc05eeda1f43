"""DeepSeek-V2, V3 and V3.2, and the Kimi K2 models, which share one architecture.

Multi-head latent attention, a few dense layers, then mixture-of-experts layers with shared experts; V3.2 adds an
indexer that chooses what is attended to. Kimi K2.5 and K2.6 wrap the text model, under the prefix `language_model.`,
together with a vision tower that MaxText's model does not have.
"""

from collections.abc import Iterator

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Layers, Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "KimiK25ForConditionalGeneration",
)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a DeepSeek or Kimi checkpoint."""
    c = config.section("text_config") or config
    prefix = "" if c is config else "language_model."
    c.refuse("moe_layer_freq", 1, why="MaxText has an expert block in every layer after the dense ones.")
    c.refuse("attention_bias", False, why="MaxText's DeepSeek attention has no bias.")
    layers, experts = c.integer("num_hidden_layers"), c.integer("n_routed_experts")
    dense = min(c.integer("first_k_dense_replace", 0, least=0), layers)
    table = RuleTable(_sizes(c, options))
    tied = c.flag("tie_word_embeddings", False)
    blocks.ends(table, f"{prefix}model.", None if tied else f"{prefix}lm_head.weight")
    if dense:
        layer = table.within(f"{prefix}model.layers.{{layer}}", "decoder/{layers}", stacked("dense_layers", dense))
        _attention(c, layer, architecture)
        blocks.mlp(layer.within("mlp", "mlp"))
    if layers > dense:
        stack = stacked("moe_layers", layers - dense, dense)
        layer = table.within(f"{prefix}model.layers.{{layer}}", "decoder/{layers}", stack)
        _attention(c, layer, architecture)
        _experts(c, layer, architecture)
    predicted = c.integer("num_nextn_predict_layers", 0, least=0)
    if options.enable_mtp:
        _prediction(c, table, f"{prefix}model.layers.{{layer}}", layers, architecture)
    ignores = _ignores(prefix, layers, predicted, enable_mtp=options.enable_mtp)
    return blocks.model("deepseek", architecture, c, table, experts=experts, ignores=ignores)


def _sizes(c: HfConfig, options: ModelOptions) -> dict[str, int]:
    heads = c.integer("num_attention_heads")
    q_lora, kv_lora = c.optional_integer("q_lora_rank") or 0, c.integer("kv_lora_rank")
    nope, rope, value = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim"), c.integer("v_head_dim")
    intermediate = c.integer("moe_intermediate_size")
    return blocks.sizes(
        c,
        options,
        q_heads=heads,
        kv_heads=heads,
        heads=heads,
        q_lora=q_lora,
        q_lora_up_proj=q_lora,
        kv_lora=kv_lora,
        kv_lora_up_proj=kv_lora + rope,
        kv=nope + rope,
        kv_head_dim=nope + value,
        value=value,
        mlp=c.integer("intermediate_size"),
        mlp_moe=intermediate,
        shared=intermediate * c.integer("n_shared_experts", 0, least=0),
        experts=c.integer("n_routed_experts"),
        hidden=c.integer("hidden_size"),
        both=2 * c.integer("hidden_size"),
    )


def _attention(c: HfConfig, layer: RuleTable, architecture: str) -> None:
    blocks.layer_norms(layer)
    attention = layer.within("self_attn", "self_attention")
    if c.optional_integer("q_lora_rank") is None:
        attention.add("q_proj.weight", "(q_heads kv) embed_attn -> embed_attn q_heads kv", "query/kernel")
    else:
        attention.add("q_a_proj.weight", "q_lora_up_proj embed_attn -> embed_attn q_lora_up_proj", "wq_a/kernel")
        attention.add("q_a_layernorm.weight", "norm:q_lora", "q_norm/scale")
        attention.add("q_b_proj.weight", "(q_heads kv) q_lora -> q_lora q_heads kv", "wq_b/kernel")
    attention.add(
        "kv_a_proj_with_mqa.weight", "kv_lora_up_proj embed_attn -> embed_attn kv_lora_up_proj", "wkv_a/kernel"
    )
    attention.add("kv_a_layernorm.weight", "norm:kv_lora", "kv_norm/scale")
    attention.add("kv_b_proj.weight", "(kv_heads kv_head_dim) kv_lora -> kv_lora kv_heads kv_head_dim", "wkv_b/kernel")
    attention.add("o_proj.weight", "embed_attn (heads kv:value) -> heads kv:value embed_attn", "out/kernel")
    if architecture == "DeepseekV32ForCausalLM":
        _indexer(c, attention.within("indexer", "indexer"))


def _indexer(c: HfConfig, table: RuleTable) -> None:
    heads, dim = c.integer("index_n_heads"), c.integer("index_head_dim")
    table = table.within("", "", q_heads=heads, kv=dim)
    table.add("wq_b.weight", "(q_heads kv) q_lora -> q_lora q_heads kv", "wq_b/kernel")
    table.add("wk.weight", "kv embed_attn -> embed_attn kv", "wk/kernel")
    table.add("k_norm.weight", ":kv", "k_norm/scale")
    table.add("k_norm.bias", ":kv", "k_norm/bias")
    table.add("weights_proj.weight", "q_heads embed_attn -> embed_attn q_heads", "weights_proj/kernel")


def _experts(c: HfConfig, layer: RuleTable, architecture: str) -> None:
    mlp = layer.within("mlp", "DeepSeekMoeBlock_0")
    mlp.add("gate.weight", ":experts embed_router -> embed_router :experts", "MoeBlock_0/gate/kernel")
    if architecture != "DeepseekV2ForCausalLM":
        # The bias decides which experts a token is sent to; it is trained and published in float32, and rounding it to
        # bfloat16 changes the routing. It is no ordinary MaxText parameter: its layer axis comes first.
        mlp.add("gate.e_score_correction_bias", ":experts", "MoeBlock_0/gate/bias", dtype="float32", scan_axis=0)
    blocks.experts(mlp.within("experts.{expert}", "MoeBlock_0"), c.integer("n_routed_experts"))
    if mlp.sizes["shared"]:
        blocks.mlp(mlp.within("shared_experts", "shared_experts", mlp=mlp.sizes["shared"]))


def _prediction(c: HfConfig, table: RuleTable, source: str, layers: int, architecture: str) -> None:
    """The layer that predicts the token after the next one. The checkpoint numbers it after all others."""
    # MaxText 0.2.5 has one, and names its parts after it. It is no part of the stacks of scanned models.
    alone = Layers(layers, (), "mtp_layer_1", "mtp_layer_1")
    mtp = table.within(source, "mtp_block/{layers}", alone)
    mtp.add("enorm.weight", "norm", "mtp_1_embedding_norm/scale")
    mtp.add("hnorm.weight", "norm", "mtp_1_hidden_state_norm/scale")
    mtp.add("eh_proj.weight", ":hidden embed:both -> embed:both :hidden", "mtp_1_projection/kernel")
    mtp.add("shared_head.norm.weight", "norm", "mtp_1_final_norm/scale")
    layer = mtp.within("", "mtp_1_transformer_layer")
    _attention(c, layer, architecture)
    _experts(c, layer, architecture)


def _ignores(prefix: str, layers: int, predicted: int, *, enable_mtp: bool) -> Iterator[Ignore]:
    for extra in range(layers, layers + predicted):
        if enable_mtp:
            why = "copies of the embedding and the output layer, which MaxText's prediction layer shares"
            layer = rf"{prefix}model\.layers\.{extra}"
            yield Ignore(rf"{layer}\.embed_tokens\.weight", why, blocks.EMBEDDING)
            yield Ignore(rf"{layer}\.shared_head\.head\.weight", why, blocks.OUTPUT_LAYER)
        else:
            yield Ignore(
                rf"{prefix}model\.layers\.{extra}\..*",
                "multi-token prediction layers are converted with --enable_mtp",
            )
    if prefix:
        yield Ignore(r"vision_tower\..*", "MaxText's model is text only: the vision tower is left out")
        yield Ignore(
            r"(multi_modal_projector|mm_projector)\..*", "MaxText's model is text only: the projector is left out"
        )
