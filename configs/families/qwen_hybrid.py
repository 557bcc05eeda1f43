"""Qwen 3-Next and Qwen 3.5: three layers of gated linear attention, then one of gated softmax attention, in turns."""

from collections.abc import Iterable

from slicecast.configs.families import blocks, qwen_vision
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Ignore, Layers, Model, ModelOptions, cycle, nested_cycle
from slicecast.convert.mapping.table import RuleTable

_NEXT = "Qwen3NextForCausalLM"
_MULTIMODAL = "Qwen3_5MoeForConditionalGeneration"
ARCHITECTURES = (_NEXT, _MULTIMODAL, "Qwen3_5MoeForCausalLM")

_CYCLE = ("linear_attention",) * 3 + ("full_attention",)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Qwen 3-Next or Qwen 3.5 checkpoint."""
    c = config.section("text_config") or config
    blocks.take_turns(c, _CYCLE)
    c.refuse("full_attention_interval", len(_CYCLE), why=f"in MaxText every layer of {_CYCLE} has full attention.")
    c.refuse("attention_bias", False, why="MaxText's attention has no bias.")
    c.refuse("mlp_only_layers", [], why="MaxText has an expert block in every layer.")
    c.refuse("decoder_sparse_step", 1, why="MaxText has an expert block in every layer.")
    c.refuse("tie_word_embeddings", False, why="MaxText's model has an output layer of its own.")
    # Qwen 3-Next has the experts one by one, Qwen 3.5 in one tensor unless it is quantized.
    forms: list[blocks.ExpertsForm] = ["separate", "fused"] if architecture == _NEXT else ["fused", "separate"]
    tables = [_table(config, c, architecture, options, form) for form in forms]
    ignores = [Ignore(r"mtp\..*", "MaxText's model has no multi-token prediction for this family")]
    if not options.use_multimodal:
        ignores.append(Ignore(r"model\.visual\..*", "vision needs --use_multimodal"))
    return blocks.model("qwen_hybrid", architecture, c, *tables, experts=c.integer("num_experts"), ignores=ignores)


def _table(
    config: HfConfig, c: HfConfig, architecture: str, options: ModelOptions, form: blocks.ExpertsForm
) -> RuleTable:
    prefix = "model.language_model" if architecture == _MULTIMODAL else "model"
    table = RuleTable(_sizes(c, options))
    blocks.ends(table, f"{prefix}.")
    for kind in _kinds(c.integer("num_hidden_layers"), nested=architecture == _NEXT):
        layer = table.within(f"{prefix}.layers.{{layer}}", "decoder/{layers}", kind)
        layer.add("input_layernorm.weight", ":hidden", "input_layernorm/scale")
        layer.add("post_attention_layernorm.weight", ":hidden", "post_attention_layernorm/scale")
        if kind.start == len(_CYCLE) - 1:
            _softmax_attention(layer.within("self_attn", "attention/attention"))
        else:
            _linear_attention(c, layer.within("linear_attn", "attention"), joined=architecture == _NEXT)
        mlp = layer.within("mlp", "mlp")
        mlp.add("shared_expert_gate.weight", ":1 embed -> embed :1", "shared_expert_gate/kernel")
        blocks.mlp(mlp.within("shared_expert", "shared_expert"))
        routed = mlp.within("", "routed_experts")
        routed.add("gate.weight", ":exp embed -> embed :exp", "gate/kernel")
        blocks.experts_in_form(routed, form)
    if options.use_multimodal:
        vision = config.require_section("vision_config")
        qwen_vision.add_vision(vision, table, "model.visual", c.integer("hidden_size"), "Qwen3_5Moe")
    return table


def _sizes(c: HfConfig, options: ModelOptions) -> dict[str, int]:
    key_heads, value_heads = c.integer("linear_num_key_heads"), c.integer("linear_num_value_heads")
    keys = key_heads * c.integer("linear_key_head_dim")
    values = value_heads * c.integer("linear_value_head_dim")
    heads = blocks.heads(c)
    return blocks.sizes(
        c,
        options,
        **heads,
        hidden=c.integer("hidden_size"),
        # A query comes with a gate of the same size.
        query_and_gate=2 * heads["kv"],
        attended=heads["q_heads"] * heads["kv"],
        value_heads=value_heads,
        head_value=c.integer("linear_value_head_dim"),
        keys=keys,
        values=values,
        qkvz=2 * keys + 2 * values,
        ba=2 * value_heads,
        mixed=2 * keys + values,
        convolution=c.integer("linear_conv_kernel_dim"),
        exp=c.integer("num_experts"),
        mlp=c.integer("shared_expert_intermediate_size"),
        mlp_moe=c.integer("moe_intermediate_size"),
    )


def _kinds(layers: int, *, nested: bool) -> Iterable[Layers]:
    """MaxText scans over cycles; in Qwen 3-Next it scans over the three linear layers of each cycle too."""
    if nested:
        return nested_cycle(layers, len(_CYCLE), "layers")
    return cycle(layers, len(_CYCLE), "layers/layer_{}")


def _softmax_attention(table: RuleTable) -> None:
    table.add(
        "q_proj.weight",
        "(q_heads kv:query_and_gate) embed_attn -> embed_attn q_heads kv:query_and_gate",
        "query/kernel",
    )
    for name, leaf in (("k_proj", "key"), ("v_proj", "value")):
        table.add(
            f"{name}.weight", "(kv_heads kv_head_dim) embed_attn -> embed_attn kv_heads kv_head_dim", f"{leaf}/kernel"
        )
    table.add("o_proj.weight", "embed_attn mlp:attended -> mlp:attended embed_attn", "out/kernel")
    table.add("q_norm.weight", ":kv", "query_norm/scale")
    table.add("k_norm.weight", ":kv", "key_norm/scale")


def _linear_attention(c: HfConfig, table: RuleTable, *, joined: bool) -> None:
    sizes = table.sizes
    qkvz = "gdn_head:qkvz embed_attn -> embed_attn gdn_head:qkvz"
    ba = "gdn_head:ba embed_attn -> embed_attn gdn_head:ba"
    if joined:
        table.add("in_proj_qkvz.weight", qkvz, "in_proj_qkvz/kernel")
        table.add("in_proj_ba.weight", ba, "in_proj_ba/kernel")
    else:
        # Qwen 3.5 has queries, keys and values of all heads one after the other, and gates in another tensor. MaxText
        # has what belongs to a key head together, as Qwen 3-Next publishes it.
        hidden, keys, values = sizes["hidden"], sizes["keys"], sizes["values"]
        groups, mixed = c.integer("linear_num_key_heads"), sizes["mixed"]
        takes = ((0, 0, keys), (0, keys, 2 * keys), (0, 2 * keys, mixed), (1, 0, values))
        members = {"in_proj_qkv.weight": (mixed, hidden), "in_proj_z.weight": (values, hidden)}
        table.add_join(members, takes, groups, qkvz, "in_proj_qkvz/kernel")
        heads = sizes["value_heads"]
        members = {"in_proj_b.weight": (heads, hidden), "in_proj_a.weight": (heads, hidden)}
        table.add_join(members, ((0, 0, heads), (1, 0, heads)), groups, ba, "in_proj_ba/kernel")
    table.add("conv1d.weight", ":mixed :1 :convolution -> :convolution :1 :mixed", "conv1d/kernel")
    # How fast a state decays: exponents, of which bfloat16 would keep three digits.
    table.add("A_log", ":value_heads", "A_log", dtype="float32")
    table.add("dt_bias", ":value_heads", "dt_bias", dtype="float32")
    table.add("norm.weight", ":head_value", "norm/rms_norm/scale")
    table.add("out_proj.weight", "embed_attn gdn_head:values -> gdn_head:values embed_attn", "out_proj/kernel")
