"""Llama 2, 3, 3.1 and 3.3, and Mistral."""

from collections.abc import Iterator

from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import InterleaveHalves, Op, Scale, Split, Transpose
from slicecast.convert.mapping.rules import Ignore, Model, Rule, Stack

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# The prefix of the rotary types, and of the models, of MaxText that rotate neighboring elements. All others rotate
# halves, as Hugging Face does. MaxText 0.2.5 decides when it runs, by the model's name and then by `rope_type`; so its
# llama3.3-70b rotates halves, without Llama 3's scaling of the frequencies, unless it is run with rope_type=llama3.1.
_INTERLEAVED = "llama3.1"


def model(config: HfConfig, architecture: str, model_name: str | None, rope_type: str | None) -> Model:
    """The rules for a Llama or Mistral checkpoint."""
    config.refuse("attention_bias", False, why="MaxText's Llama attention has no bias.")
    config.refuse("mlp_bias", False, why="MaxText's Llama MLP has no bias.")
    interleaved, note = _rotates_neighbors(config, model_name, rope_type)
    return Model(
        family="llama",
        description=(
            f"{architecture}: {config.integer('num_hidden_layers')} layers, hidden {config.integer('hidden_size')}, "
            f"vocabulary {config.integer('vocab_size')}"
        ),
        rules=tuple(_rules(config, interleaved)),
        ignores=tuple(_ignores(config)),
        notes=(f"rotary layout {note}",),
    )


def _rotates_neighbors(config: HfConfig, model_name: str | None, rope_type: str | None) -> tuple[bool, str]:
    """Whether the MaxText model that will load this rotates neighbors or halves, and a sentence that says why."""
    # transformers 5 writes `rope_parameters`, earlier versions `rope_scaling`.
    section = config.section("rope_parameters") or config.section("rope_scaling")
    scaled = section is not None and "llama3" in (section.values.get("rope_type"), section.values.get("type"))
    if model_name is None and rope_type is None:
        if scaled:
            return True, "for MaxText's rope_type=llama3.1 (its llama3.1 models), because config.json has that scaling"
        return False, "for MaxText's rope_type=default, because config.json has no special rotary embedding"
    given = [f"--{name}={value}" for name, value in (("model_name", model_name), ("rope_type", rope_type)) if value]
    if any(name is not None and name.startswith(_INTERLEAVED) for name in (model_name, rope_type)):
        return True, f"for MaxText's rope_type=llama3.1, because of {' and '.join(given)}"
    note = f"for MaxText's rope_type=default, because of {' and '.join(given)}"
    if scaled:
        note += (
            ". That leaves out the frequency scaling that config.json asks for; for the right logits, convert and run "
            "with rope_type=llama3.1"
        )
    return False, note


def _rules(c: HfConfig, interleaved: bool) -> Iterator[Rule]:
    hidden, vocab, intermediate = c.integer("hidden_size"), c.integer("vocab_size"), c.integer("intermediate_size")
    heads = c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", heads)
    head_dim = c.integer("head_dim", hidden // heads)
    stack = Stack("layer", "layers", 0, c.integer("num_hidden_layers"))
    stacks = (stack,)
    rotary: tuple[Op, ...] = (InterleaveHalves(),) if interleaved else ()

    yield Rule("model.embed_tokens.weight", (vocab, hidden), "token_embedder/embedding", (), ("vocab", "embed_vocab"))
    yield Rule("model.norm.weight", (hidden,), "decoder/decoder_norm/scale", (), ("norm",))
    # All of MaxText's Llama and Mistral models have a separate output layer, so tied weights are written twice.
    head = "model.embed_tokens.weight" if c.flag("tie_word_embeddings", False) else "lm_head.weight"
    yield Rule(head, (vocab, hidden), "decoder/logits_dense/kernel", (Transpose(),), ("embed_vocab", "vocab"))
    source, target = "model.layers.{layer}", "decoder/{layers}"
    for name, leaf in (
        ("input_layernorm", "pre_self_attention_layer_norm"),
        ("post_attention_layernorm", "post_self_attention_layer_norm"),
    ):
        yield Rule(f"{source}.{name}.weight", (hidden,), f"{target}/{leaf}/scale", (), ("norm",), stacks)
    # MaxText does not scale the attention logits: its checkpoints hold queries multiplied by 1 / sqrt(head_dim).
    yield Rule(
        f"{source}.self_attn.q_proj.weight",
        (heads * head_dim, hidden),
        f"{target}/self_attention/query/kernel",
        (Transpose(), Split(1, (heads, head_dim)), *rotary, Scale(head_dim**-0.5)),
        ("embed_attn", "q_heads", "kv"),
        stacks,
    )
    for name, leaf, extra in (("k_proj", "key", rotary), ("v_proj", "value", ())):
        yield Rule(
            f"{source}.self_attn.{name}.weight",
            (kv_heads * head_dim, hidden),
            f"{target}/self_attention/{leaf}/kernel",
            (Transpose(), Split(1, (kv_heads, head_dim)), *extra),
            ("embed_attn", "kv_heads", "kv_head_dim"),
            stacks,
        )
    yield Rule(
        f"{source}.self_attn.o_proj.weight",
        (hidden, heads * head_dim),
        f"{target}/self_attention/out/kernel",
        (Transpose(), Split(0, (heads, head_dim))),
        ("heads", "kv", "embed_attn"),
        stacks,
    )
    for name, leaf in (("gate_proj", "wi_0"), ("up_proj", "wi_1")):
        yield Rule(
            f"{source}.mlp.{name}.weight",
            (intermediate, hidden),
            f"{target}/mlp/{leaf}/kernel",
            (Transpose(),),
            ("embed", "mlp"),
            stacks,
        )
    yield Rule(
        f"{source}.mlp.down_proj.weight",
        (hidden, intermediate),
        f"{target}/mlp/wo/kernel",
        (Transpose(),),
        ("mlp", "embed"),
        stacks,
    )


def _ignores(c: HfConfig) -> Iterator[Ignore]:
    yield Ignore(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the config")
    if c.flag("tie_word_embeddings", False):
        yield Ignore(r"lm_head\.weight", "config.json ties the output layer to the embedding")
