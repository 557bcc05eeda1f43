"""DeepSeek-V4: hyper-connections, compressed attention of two kinds in turns, and experts chosen by token at first.

Published names are those of DeepSeek's own program.
"""

from slicecast.configs.families import blocks
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, LayerAxis, Layers, Model, ModelOptions
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("DeepseekV4ForCausalLM",)

# How many tokens a compressor makes one of: 4 (with an indexer that chooses among them), or 128.
_INDEXED, _HEAVY = 4, 128


def model(c: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a DeepSeek-V4 checkpoint."""
    c.refuse("tie_word_embeddings", False, why="MaxText's DeepSeek-V4 has an output layer of its own.")
    c.refuse("attention_bias", False, why="MaxText's DeepSeek-V4 attention has no bias.")
    layers, experts = c.integer("num_hidden_layers"), c.integer("n_routed_experts")
    first = min(c.integer("num_hash_layers", 0, least=0), layers)
    table = RuleTable(_sizes(c, options))
    blocks.embedding(table, "embed.weight")
    table.add("norm.weight", "norm", "decoder/decoder_norm/scale")
    blocks.output_layer(table, "head.weight")
    # Hyper-connections mix the copies of the residual stream; they are published in float32, and small.
    head = table.within("", "decoder/hc_head")
    mixing = ":copies activation_embed:streams -> activation_embed:streams :copies"
    head.add("hc_head_fn", mixing, "hc_fn", dtype="float32")
    head.add("hc_head_base", ":copies", "hc_base", dtype="float32")
    head.add("hc_head_scale", ":1", "hc_scale", dtype="float32")
    for kind, ratio in _layers(c, layers, first):
        layer = table.within("layers.{layer}", "decoder/{layers}", kind)
        layer.add("attn_norm.weight", "norm", "pre_self_attention_layer_norm/scale")
        layer.add("ffn_norm.weight", "norm", "post_self_attention_layer_norm/scale")
        _hyper_connection(layer, "hc_attn", "mhc_attention")
        _hyper_connection(layer, "hc_ffn", "mhc_mlp")
        _attention(c, layer.within("attn", "self_attention"), ratio)
        _experts(layer.within("ffn", "mlp"), by_token=kind.start < first)
    mtp = Ignore(r"mtp\..*", "MaxText's model has no multi-token prediction for this family")
    return blocks.model("deepseek_v4", architecture, c, table, experts=experts, ignores=[mtp])


def _sizes(c: HfConfig, options: ModelOptions) -> dict[str, int]:
    heads, head_dim = c.integer("num_attention_heads"), c.integer("head_dim")
    groups, rank, copies = c.integer("o_groups"), c.integer("o_lora_rank"), c.integer("hc_mult")
    return blocks.sizes(
        c,
        options,
        q_lora=c.integer("q_lora_rank"),
        q_heads=heads,
        kv=head_dim,
        kv_heads=c.integer("num_key_value_heads"),
        kv_head_dim=head_dim,
        o_groups=groups,
        o_group=heads * head_dim // groups,
        o_lora_up_proj=rank,
        o_lora=groups * rank,
        indexer_heads=c.integer("index_n_heads"),
        indexer_q=c.integer("index_n_heads") * c.integer("index_head_dim"),
        indexer_head=c.integer("index_head_dim"),
        copies=copies,
        copies_out=copies,
        streams=copies * c.integer("hidden_size"),
        # What each copy gives, what each takes, and how they mix.
        connections=2 * copies + copies * copies,
        mixed=copies * copies,
        experts=c.integer("n_routed_experts"),
        chosen=c.integer("num_experts_per_tok"),
        exp=c.integer("n_routed_experts"),
        mlp_moe=c.integer("moe_intermediate_size"),
        mlp=c.integer("moe_intermediate_size") * c.integer("n_shared_experts"),
    )


def _layers(c: HfConfig, layers: int, first: int) -> list[tuple[Layers, int]]:
    """The kinds of layers with their compression: the first ones alone, then pairs."""
    ratios = c.sequence("compress_ratios") or [0, 0] + [_HEAVY if i % 2 else _INDEXED for i in range(2, layers)]
    if min(layers, len(ratios)) < first + 2:
        raise ConfigError(
            f"{c.where}: field 'num_hidden_layers' is {layers}, and there are {len(ratios)} compress_ratios; a pair of "
            f"layers is expected after the first {first}. Use the config.json that was published with the weights."
        )
    alone = [(Layers(layer, (), f"layers_{layer}"), ratios[layer]) for layer in range(first)]
    repeats = LayerAxis("scanned_blocks", (layers - first) // 2, 2)
    pair = [
        (Layers(layer, (repeats,), f"scanned_blocks/layers_{layer - first}"), ratios[layer])
        for layer in (first, first + 1)
    ]
    return alone + pair


def _hyper_connection(layer: RuleTable, source: str, target: str) -> None:
    copies, all_ = layer.sizes["copies"], layer.sizes["connections"]
    parts = (("pre", 0, copies), ("post", copies, 2 * copies), ("res", 2 * copies, all_))
    for index, (part, start, stop) in enumerate(parts):
        taken, size = f"{start}:{stop}/{all_}", "mixed" if part == "res" else "copies"
        alpha = f"({taken} :{size}) activation_embed:streams -> activation_embed:streams :{size}"
        layer.add(f"{source}_fn", alpha, f"{target}/{part}_alpha", dtype="float32")
        beta = f"({taken} :copies :copies_out)" if part == "res" else f"({taken} :copies)"
        layer.add(f"{source}_base", beta, f"{target}/{part}_beta", dtype="float32")
        layer.add(f"{source}_scale", f"({index}/3 :1)", f"{target}/{part}_alpha_scale", dtype="float32")
    layer.add_constant(
        1.0, "MaxText's norm has a scale, and DeepSeek's has none", "norm:streams", f"{target}/mhc_norm/scale"
    )


def _attention(c: HfConfig, table: RuleTable, ratio: int) -> None:
    table.add("wq_a.weight", "q_lora embed_attn -> embed_attn q_lora", "wq_a/kernel")
    table.add("q_norm.weight", "norm:q_lora", "q_norm/scale")
    table.add("wq_b.weight", "(q_heads kv) q_lora -> q_lora q_heads kv", "wq_b/kernel")
    table.add("wkv.weight", "(kv_heads kv_head_dim) embed_attn -> embed_attn kv_heads kv_head_dim", "wkv/kernel")
    table.add("kv_norm.weight", "norm:kv", "kv_norm/scale")
    table.add("attn_sink", ":q_heads", "sinks", dtype="float32")
    table.add(
        "wo_a.weight",
        "(o_groups o_lora_up_proj) q_heads:o_group -> o_groups q_heads:o_group o_lora_up_proj",
        "o_a_proj/kernel",
    )
    table.add("wo_b.weight", "embed_attn o_lora_up_proj:o_lora -> o_lora_up_proj:o_lora embed_attn", "o_b_proj/kernel")
    if ratio == _INDEXED:
        # Each token is seen by two windows, so there are two sets of everything.
        _compressor(table.within("compressor", "csa_compressor"), ratio, 2, "kv")
        indexer = table.within("indexer", "csa_compressor/indexer")
        _compressor(indexer.within("compressor", ""), ratio, 2, "indexer_head")
        indexer.add("wq_b.weight", "indexer_q q_lora -> q_lora indexer_q", "q_proj/kernel")
        indexer.add(
            "weights_proj.weight",
            "indexer_weights:indexer_heads embed_attn -> embed_attn indexer_weights:indexer_heads",
            "weights_proj/kernel",
        )
    elif ratio:
        _compressor(table.within("compressor", "hca_compressor"), ratio, 1, "kv")


def _compressor(table: RuleTable, ratio: int, sets: int, head: str) -> None:
    table = table.within("", "", window=ratio, width=sets * table.sizes[head])
    table.add("wgate.weight", "kv:width embed_attn -> embed_attn kv:width", "gate_proj/kernel")
    table.add("wkv.weight", "kv:width embed_attn -> embed_attn kv:width", "kv_proj/kernel")
    table.add("norm.weight", f"norm:{head}", "kv_norm/scale")
    table.add("ape", ":window :width", "position_bias", dtype="float32")


def _experts(table: RuleTable, *, by_token: bool) -> None:
    table.add("gate.weight", ":experts embed_router -> embed_router :experts", "MoeBlock_0/gate/kernel")
    # Neither is an ordinary parameter of MaxText's: layers come first. The numbers of experts must stay whole; the bias
    # decides which experts a token is sent to, and rounding it would change that.
    if by_token:
        table.add("gate.tid2eid", ":tokens :chosen", "MoeBlock_0/tid2eid", dtype="float32", scan_axis=0)
    else:
        table.add("gate.bias", ":experts", "MoeBlock_0/gate/bias", dtype="float32", scan_axis=0)
    blocks.mlp(table.within("shared_experts", "shared_experts"), ("w1", "w3", "w2"))
    blocks.experts(table.within("experts.{expert}", "MoeBlock_0"), table.sizes["exp"], ("w1", "w3", "w2"))
