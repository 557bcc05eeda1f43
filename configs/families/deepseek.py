"""DeepSeek-V2, DeepSeek-V3 and the Kimi K2 models, which share one architecture.

Multi-head latent attention, a few dense layers, then mixture-of-experts layers with shared experts. Kimi K2.5 and K2.6
wrap the text model, under the prefix `language_model.`, together with a vision tower that MaxText's model does not
have.
"""

from collections.abc import Iterator

from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Split, Transpose
from slicecast.convert.mapping.rules import Ignore, Model, Rule, Stack

ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
)


def model(config: HfConfig, architecture: str, model_name: str | None, rope_type: str | None) -> Model:
    """The rules for a DeepSeek or Kimi checkpoint."""
    text = config.section("text_config") or config
    prefix = "" if text is config else "language_model."
    text.refuse("moe_layer_freq", 1, why="MaxText has an expert block in every layer after the dense ones.")
    text.refuse("attention_bias", False, why="MaxText's DeepSeek attention has no bias.")
    layers = text.integer("num_hidden_layers")
    dense = min(text.integer("first_k_dense_replace", 0, least=0), layers)
    return Model(
        family="deepseek",
        description=(
            f"{architecture}: {layers} layers ({dense} dense), {text.integer('n_routed_experts')} experts, "
            f"hidden {text.integer('hidden_size')}, vocabulary {text.integer('vocab_size')}"
        ),
        rules=tuple(_rules(text, prefix, layers, dense, has_router_bias=architecture != "DeepseekV2ForCausalLM")),
        ignores=tuple(_ignores(text, prefix, layers)),
    )


def _rules(c: HfConfig, prefix: str, layers: int, dense: int, *, has_router_bias: bool) -> Iterator[Rule]:
    hidden, vocab = c.integer("hidden_size"), c.integer("vocab_size")
    yield Rule(
        f"{prefix}model.embed_tokens.weight", (vocab, hidden), "token_embedder/embedding", (), ("vocab", "embed_vocab")
    )
    yield Rule(f"{prefix}model.norm.weight", (hidden,), "decoder/decoder_norm/scale", (), ("norm",))
    if not c.flag("tie_word_embeddings", False):
        yield Rule(
            f"{prefix}lm_head.weight",
            (vocab, hidden),
            "decoder/logits_dense/kernel",
            (Transpose(),),
            ("embed_vocab", "vocab"),
        )
    if dense:
        stack = Stack("layer", "dense_layers", 0, dense)
        yield from _attention(c, prefix, stack)
        yield from _mlp(
            f"{prefix}model.layers.{{layer}}.mlp",
            "decoder/{dense_layers}/mlp",
            hidden,
            c.integer("intermediate_size"),
            stack,
        )
    if layers > dense:
        stack = Stack("layer", "moe_layers", dense, layers - dense)
        yield from _attention(c, prefix, stack)
        yield from _experts(c, prefix, stack, has_router_bias=has_router_bias)


def _attention(c: HfConfig, prefix: str, stack: Stack) -> Iterator[Rule]:
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    q_lora, kv_lora = c.optional_integer("q_lora_rank"), c.integer("kv_lora_rank")
    nope, rope, value = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim"), c.integer("v_head_dim")
    source = f"{prefix}model.layers.{{layer}}"
    target = f"decoder/{{{stack.axis}}}"
    stacks = (stack,)

    yield Rule(
        f"{source}.input_layernorm.weight",
        (hidden,),
        f"{target}/pre_self_attention_layer_norm/scale",
        (),
        ("norm",),
        stacks,
    )
    yield Rule(
        f"{source}.post_attention_layernorm.weight",
        (hidden,),
        f"{target}/post_self_attention_layer_norm/scale",
        (),
        ("norm",),
        stacks,
    )
    source, target = f"{source}.self_attn", f"{target}/self_attention"
    split_heads = (Transpose(), Split(1, (heads, nope + rope)))
    if q_lora is None:
        yield Rule(
            f"{source}.q_proj.weight",
            (heads * (nope + rope), hidden),
            f"{target}/query/kernel",
            split_heads,
            ("embed_attn", "q_heads", "kv"),
            stacks,
        )
    else:
        yield Rule(
            f"{source}.q_a_proj.weight",
            (q_lora, hidden),
            f"{target}/wq_a/kernel",
            (Transpose(),),
            ("embed_attn", "q_lora_up_proj"),
            stacks,
        )
        yield Rule(f"{source}.q_a_layernorm.weight", (q_lora,), f"{target}/q_norm/scale", (), ("norm",), stacks)
        yield Rule(
            f"{source}.q_b_proj.weight",
            (heads * (nope + rope), q_lora),
            f"{target}/wq_b/kernel",
            split_heads,
            ("q_lora", "q_heads", "kv"),
            stacks,
        )
    yield Rule(
        f"{source}.kv_a_proj_with_mqa.weight",
        (kv_lora + rope, hidden),
        f"{target}/wkv_a/kernel",
        (Transpose(),),
        ("embed_attn", "kv_lora_up_proj"),
        stacks,
    )
    yield Rule(f"{source}.kv_a_layernorm.weight", (kv_lora,), f"{target}/kv_norm/scale", (), ("norm",), stacks)
    yield Rule(
        f"{source}.kv_b_proj.weight",
        (heads * (nope + value), kv_lora),
        f"{target}/wkv_b/kernel",
        (Transpose(), Split(1, (heads, nope + value))),
        ("kv_lora", "kv_heads", "kv_head_dim"),
        stacks,
    )
    yield Rule(
        f"{source}.o_proj.weight",
        (hidden, heads * value),
        f"{target}/out/kernel",
        (Transpose(), Split(0, (heads, value))),
        ("heads", "kv", "embed_attn"),
        stacks,
    )


def _mlp(source: str, target: str, hidden: int, intermediate: int, stack: Stack) -> Iterator[Rule]:
    for name, leaf in (("gate_proj", "wi_0"), ("up_proj", "wi_1")):
        yield Rule(
            f"{source}.{name}.weight",
            (intermediate, hidden),
            f"{target}/{leaf}/kernel",
            (Transpose(),),
            ("embed", "mlp"),
            (stack,),
        )
    yield Rule(
        f"{source}.down_proj.weight",
        (hidden, intermediate),
        f"{target}/wo/kernel",
        (Transpose(),),
        ("mlp", "embed"),
        (stack,),
    )


def _experts(c: HfConfig, prefix: str, stack: Stack, *, has_router_bias: bool) -> Iterator[Rule]:
    hidden, intermediate = c.integer("hidden_size"), c.integer("moe_intermediate_size")
    experts = Stack("expert", "exp", 0, c.integer("n_routed_experts"), always=True)
    source = f"{prefix}model.layers.{{layer}}.mlp"
    target = f"decoder/{{{stack.axis}}}/DeepSeekMoeBlock_0"
    yield Rule(
        f"{source}.gate.weight",
        (experts.size, hidden),
        f"{target}/MoeBlock_0/gate/kernel",
        (Transpose(),),
        ("embed_router", None),
        (stack,),
    )
    if has_router_bias:
        # The bias decides which experts a token is sent to; it is trained and published in float32, and rounding it to
        # bfloat16 changes the routing. It is no ordinary MaxText parameter: its layer axis comes first.
        yield Rule(
            f"{source}.gate.e_score_correction_bias",
            (experts.size,),
            f"{target}/MoeBlock_0/gate/bias",
            (),
            (None,),
            (stack,),
            dtype="float32",
            scan_axis=0,
        )
    for name, leaf in (("gate_proj", "wi_0"), ("up_proj", "wi_1")):
        yield Rule(
            f"{source}.experts.{{expert}}.{name}.weight",
            (intermediate, hidden),
            f"{target}/MoeBlock_0/{leaf}",
            (Transpose(),),
            ("embed_moe", "mlp_moe"),
            (stack, experts),
        )
    yield Rule(
        f"{source}.experts.{{expert}}.down_proj.weight",
        (hidden, intermediate),
        f"{target}/MoeBlock_0/wo",
        (Transpose(),),
        ("mlp_moe", "embed_moe"),
        (stack, experts),
    )
    shared = c.integer("n_shared_experts", 0, least=0)
    if shared:
        yield from _mlp(f"{source}.shared_experts", f"{target}/shared_experts", hidden, shared * intermediate, stack)


def _ignores(c: HfConfig, prefix: str, layers: int) -> Iterator[Ignore]:
    yield Ignore(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the config")
    for extra in range(c.integer("num_nextn_predict_layers", 0, least=0)):
        yield Ignore(
            rf"{prefix}model\.layers\.{layers + extra}\..*",
            "multi-token prediction layers are not converted",
        )
    if prefix:
        yield Ignore(r"vision_tower\..*", "MaxText's model is text only: the vision tower is left out")
        yield Ignore(
            r"(multi_modal_projector|mm_projector)\..*", "MaxText's model is text only: the projector is left out"
        )
