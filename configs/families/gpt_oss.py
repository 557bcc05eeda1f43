"""OpenAI's gpt-oss.

Grouped-query attention with biases and sinks, sliding and full in turns, and experts in every layer. The experts of a
layer are one tensor, and so are their gate and up projections, column by column: even ones gate, odd ones up.
"""

from collections.abc import Iterator

from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Split, Stride, Transpose
from slicecast.convert.mapping.rules import Model, Rule, Stack

ARCHITECTURES = ("GptOssForCausalLM",)

# The kinds of layers that take turns. MaxText scans over pairs of them.
_CYCLE = ("sliding_attention", "full_attention")


def model(config: HfConfig, architecture: str, model_name: str | None, rope_type: str | None) -> Model:
    """The rules for a gpt-oss checkpoint."""
    layers = config.integer("num_hidden_layers")
    if layers % len(_CYCLE):
        raise ConfigError(
            f"{config.where}: field 'num_hidden_layers' is {layers}, which is not supported: MaxText's gpt-oss is made "
            f"of cycles of {len(_CYCLE)} layers."
        )
    config.refuse("layer_types", list(_CYCLE) * (layers // len(_CYCLE)), why=f"MaxText repeats {', '.join(_CYCLE)}.")
    config.refuse("attention_bias", True, why="MaxText's gpt-oss attention has biases.")
    config.refuse("tie_word_embeddings", False, why="MaxText's gpt-oss has an output layer of its own.")
    return Model(
        family="gpt_oss",
        description=(
            f"{architecture}: {layers} layers, {config.integer('num_local_experts')} experts, "
            f"hidden {config.integer('hidden_size')}, vocabulary {config.integer('vocab_size')}"
        ),
        rules=tuple(_rules(config, layers)),
    )


def _rules(c: HfConfig, layers: int) -> Iterator[Rule]:
    hidden, vocab = c.integer("hidden_size"), c.integer("vocab_size")
    yield Rule("model.embed_tokens.weight", (vocab, hidden), "token_embedder/embedding", (), ("vocab", "embed_vocab"))
    yield Rule("model.norm.weight", (hidden,), "decoder/decoder_norm/scale", (), ("norm",))
    yield Rule(
        "lm_head.weight", (vocab, hidden), "decoder/logits_dense/kernel", (Transpose(),), ("embed_vocab", "vocab")
    )
    for position in range(len(_CYCLE)):
        stack = Stack(
            "layer",
            "layers",
            start=position,
            size=layers // len(_CYCLE),
            step=len(_CYCLE),
            block=f"layers/layers_{position}",
        )
        for name, leaf in (
            ("input_layernorm", "pre_self_attention_layer_norm"),
            ("post_attention_layernorm", "post_self_attention_layer_norm"),
        ):
            yield Rule(
                f"model.layers.{{layer}}.{name}.weight",
                (hidden,),
                f"decoder/{{layers}}/{leaf}/scale",
                (),
                ("norm",),
                (stack,),
            )
        yield from _attention(c, hidden, stack)
        yield from _experts(c, hidden, stack)


def _attention(c: HfConfig, hidden: int, stack: Stack) -> Iterator[Rule]:
    heads, head_dim = c.integer("num_attention_heads"), c.integer("head_dim")
    source, target = "model.layers.{layer}.self_attn", "decoder/{layers}/GptOssAttention"
    for name, leaf, count, axes in (
        ("q_proj", "query", heads, ("q_heads", "kv")),
        ("k_proj", "key", c.integer("num_key_value_heads"), ("kv_heads", "kv_head_dim")),
        ("v_proj", "value", c.integer("num_key_value_heads"), ("kv_heads", "kv_head_dim")),
    ):
        yield Rule(
            f"{source}.{name}.weight",
            (count * head_dim, hidden),
            f"{target}/{leaf}/kernel",
            (Transpose(), Split(1, (count, head_dim))),
            ("embed_attn", *axes),
            (stack,),
        )
        yield Rule(
            f"{source}.{name}.bias",
            (count * head_dim,),
            f"{target}/{leaf}/bias",
            (Split(0, (count, head_dim)),),
            axes,
            (stack,),
        )
    yield Rule(
        f"{source}.o_proj.weight",
        (hidden, heads * head_dim),
        f"{target}/out/kernel",
        (Transpose(), Split(0, (heads, head_dim))),
        ("heads", "kv", "embed_attn"),
        (stack,),
    )
    yield Rule(f"{source}.o_proj.bias", (hidden,), f"{target}/out/bias", (), ("embed_attn",), (stack,))
    yield Rule(f"{source}.sinks", (heads,), f"{target}/sinks", (), (None,), (stack,))


def _experts(c: HfConfig, hidden: int, stack: Stack) -> Iterator[Rule]:
    experts, intermediate = c.integer("num_local_experts"), c.integer("intermediate_size")
    source, target = "model.layers.{layer}.mlp", "decoder/{layers}/GptOssMlp"
    yield Rule(
        f"{source}.router.weight",
        (experts, hidden),
        f"{target}/gate/kernel",
        (Transpose(),),
        ("embed", None),
        (stack,),
    )
    yield Rule(f"{source}.router.bias", (experts,), f"{target}/gate/bias", (), (None,), (stack,))
    for first, leaf in enumerate(("wi_0", "wi_1")):
        yield Rule(
            f"{source}.experts.gate_up_proj",
            (experts, hidden, 2 * intermediate),
            f"{target}/{leaf}",
            (Stride(2, first, 2),),
            ("exp", "embed_moe", "mlp_moe"),
            (stack,),
        )
        yield Rule(
            f"{source}.experts.gate_up_proj_bias",
            (experts, 2 * intermediate),
            f"{target}/{leaf}_bias",
            (Stride(1, first, 2),),
            ("exp", "activation_mlp"),
            (stack,),
        )
    yield Rule(
        f"{source}.experts.down_proj",
        (experts, intermediate, hidden),
        f"{target}/wo",
        (),
        ("exp", "mlp_moe", "embed_moe"),
        (stack,),
    )
    yield Rule(
        f"{source}.experts.down_proj_bias",
        (experts, hidden),
        f"{target}/wo_bias",
        (),
        ("exp", "activation_embed"),
        (stack,),
    )
