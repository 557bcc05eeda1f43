"""What many families have in common: sizes by MaxText's axis names, embeddings, attention, and feed-forward blocks."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Op
from slicecast.convert.mapping.rules import Constant, Ignore, Model, ModelOptions
from slicecast.convert.mapping.table import RuleTable

ExpertsForm = Literal["separate", "fused", "fused, inputs first"]

# Where the token embedding and an output layer of its own go.
EMBEDDING = "token_embedder/embedding"
OUTPUT_LAYER = "decoder/logits_dense/kernel"

# MaxText's logical names of axes that are all as long as the hidden state.
_HIDDEN = ("norm", "embed", "embed_attn", "embed_vocab", "embed_moe", "embed_router", "activation_embed")

_ROTARY_FREQUENCIES = Ignore(r".*\.rotary_emb\.(original_)?inv_freq", "rotary frequencies are computed from the config")


def sizes(c: HfConfig, options: ModelOptions, **more: int) -> dict[str, int]:
    """Sizes by axis name: of the hidden state, of the vocabulary, and others.

    `vocab` is the model's vocabulary and `tokens` the checkpoint's, which may differ.
    """
    tokens = c.integer("vocab_size")
    hidden = dict.fromkeys(_HIDDEN, c.integer("hidden_size"))
    return {**hidden, "tokens": tokens, "vocab": options.vocab_size or tokens, **more}


def heads(c: HfConfig) -> dict[str, int]:
    """Sizes of grouped-query attention by axis name."""
    q_heads = c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", c.integer("hidden_size") // q_heads)
    return head_sizes(q_heads, c.integer("num_key_value_heads", q_heads), head_dim)


def head_sizes(q_heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """The same, for these numbers."""
    return {"q_heads": q_heads, "heads": q_heads, "kv_heads": kv_heads, "kv": head_dim, "kv_head_dim": head_dim}


def take_turns(c: HfConfig, kinds: Sequence[str], *, whole: bool = True) -> None:
    """Refuses layers that do not take turns as MaxText has it.

    Args:
        c: The config with `num_hidden_layers`, and `layer_types` where the config says more than that.
        kinds: The kinds of a cycle.
        whole: Whether MaxText has whole cycles only.

    Raises:
        ConfigError: If there is part of a cycle, or another order.
    """
    layers = c.integer("num_hidden_layers")
    if whole and layers % len(kinds):
        raise ConfigError(
            f"{c.where}: field 'num_hidden_layers' is {layers}, which is not supported: MaxText's model is made of "
            f"cycles of {len(kinds)} layers."
        )
    expected = [kinds[layer % len(kinds)] for layer in range(layers)]
    c.refuse("layer_types", expected, why=f"MaxText repeats {', '.join(kinds)}.")


def model(
    family: str,
    architecture: str,
    c: HfConfig,
    *tables: RuleTable,
    experts: int = 0,
    ignores: Iterable[Ignore] = (),
    notes: Iterable[str] = (),
    **more: Any,
) -> Model:
    """The model with the rules of a table, and of further ones in which it is stored otherwise; and what it is called.

    Args:
        family: The name of the family.
        architecture: What `config.json` calls it.
        c: The config with the sizes.
        tables: The rules in each form.
        experts: How many experts a layer has.
        ignores: What is left out, beside rotary frequencies.
        notes: What the plan should say, beside a vocabulary that is not the checkpoint's and leaves that are made up.
        more: Further fields of the model.
    """
    tokens, vocab = tables[0].sizes["tokens"], tables[0].sizes["vocab"]
    what = "rows of zeros are added to the embedding" if vocab > tokens else "the embedding's last rows are left out"
    resized = [] if vocab == tokens else [f"MaxText's model has {vocab} tokens, the checkpoint {tokens}: {what}"]
    constants = dict.fromkeys(rule.source for rule in tables[0].rules if isinstance(rule.source, Constant))
    made_up = [f"leaves in which everything is {each.value:g} are made up: {each.why}" for each in constants]
    return Model(
        family=family,
        description=(
            f"{architecture}: {c.integer('num_hidden_layers')} layers, {f'{experts} experts, ' if experts else ''}"
            f"hidden {c.integer('hidden_size')}, vocabulary {tokens}"
        ),
        rules=tables[0].rules,
        other_forms=[table.rules for table in tables[1:]],
        ignores=(_ROTARY_FREQUENCIES, *ignores),
        notes=(*notes, *resized, *made_up),
        **more,
    )


def ends(table: RuleTable, prefix: str = "model.", output: str | None = "lm_head.weight") -> None:
    """What stands before and behind the layers: the embedding, the last norm, and an output layer if there is one."""
    embedding(table, f"{prefix}embed_tokens.weight")
    table.add(f"{prefix}norm.weight", "norm", "decoder/decoder_norm/scale")
    if output is not None:
        output_layer(table, output)


def layer_norms(layer: RuleTable) -> None:
    """The norms before attention and before the feed-forward block, as most families call them."""
    layer.add("input_layernorm.weight", "norm", "pre_self_attention_layer_norm/scale")
    layer.add("post_attention_layernorm.weight", "norm", "post_self_attention_layer_norm/scale")


def embedding(table: RuleTable, name: str, *ops: Op) -> None:
    """The token embedding."""
    table.add(name, "vocab~tokens embed_vocab", EMBEDDING, *ops)


def tied_output(name: str) -> Ignore:
    """An output layer that is stored though it is the embedding again; `name` is a regular expression."""
    return Ignore(name, "config.json ties the output layer to the embedding", copy_of=EMBEDDING)


def output_layer(table: RuleTable, name: str) -> None:
    """An output layer of its own."""
    table.add(name, "vocab~tokens embed_vocab -> embed_vocab vocab", OUTPUT_LAYER)


def attention(
    table: RuleTable,
    *,
    query: tuple[Op, ...] = (),
    key: tuple[Op, ...] = (),
    biases: bool = False,
    keys: bool = True,
    values: bool = True,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> None:
    """The projections of grouped-query attention.

    Args:
        table: Within the attention of a layer; it has the sizes `q_heads`, `kv_heads`, `kv` and `kv_head_dim`.
        query: What is done to queries, `[embed, heads, head_dim]`.
        key: What is done to keys.
        biases: Whether queries, keys and values have biases.
        keys: Whether there are keys; otherwise those of another layer are used.
        values: Whether there are values; otherwise those of another layer are used, or the keys.
        names: What the projections of queries, keys, values and of the result are called.
    """
    query_name, key_name, value_name, out_name = names
    projections = [(query_name, "query", "q_heads kv", query)]
    if keys:
        projections.append((key_name, "key", "kv_heads kv_head_dim", key))
    if values:
        projections.append((value_name, "value", "kv_heads kv_head_dim", ()))
    for name, leaf, axes, ops in projections:
        table.add(f"{name}.weight", f"({axes}) embed_attn -> embed_attn {axes}", f"{leaf}/kernel", *ops)
        if biases:
            table.add(f"{name}.bias", f"({axes})", f"{leaf}/bias")
    table.add(f"{out_name}.weight", "embed_attn (heads kv) -> heads kv embed_attn", "out/kernel")


def mlp(table: RuleTable, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
    """A gated feed-forward block: the names of its gate, up and down projections; the size is `mlp`."""
    gate, up, down = names
    table.add(f"{gate}.weight", "mlp embed -> embed mlp", "wi_0/kernel")
    table.add(f"{up}.weight", "mlp embed -> embed mlp", "wi_1/kernel")
    table.add(f"{down}.weight", "embed mlp -> mlp embed", "wo/kernel")


def experts(table: RuleTable, count: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
    """Experts that are tensors of their own, `{expert}` in the table's source; the size is `mlp_moe`."""
    gate, up, down = names
    table.add(f"{gate}.weight", "mlp_moe embed_moe -> embed_moe mlp_moe", "wi_0", experts=count)
    table.add(f"{up}.weight", "mlp_moe embed_moe -> embed_moe mlp_moe", "wi_1", experts=count)
    table.add(f"{down}.weight", "embed_moe mlp_moe -> mlp_moe embed_moe", "wo", experts=count)


def fused_experts(table: RuleTable) -> None:
    """Experts that are one tensor, rows `[out, in]`, the gate's before the up projection's; the size is `exp`."""
    for half, leaf in enumerate(("wi_0", "wi_1")):
        table.add("gate_up_proj", f"exp ({half}/2 mlp_moe) embed_moe -> exp embed_moe mlp_moe", leaf)
    table.add("down_proj", "exp embed_moe mlp_moe -> exp mlp_moe embed_moe", "wo")


def fused_experts_inputs_first(table: RuleTable) -> None:
    """The same, `[in, out]`, as MaxText has them."""
    for half, leaf in enumerate(("wi_0", "wi_1")):
        table.add("gate_up_proj", f"exp embed_moe ({half}/2 mlp_moe)", leaf)
    table.add("down_proj", "exp mlp_moe embed_moe", "wo")


def experts_in_form(table: RuleTable, form: ExpertsForm) -> None:
    """Experts in one of the forms in which a family's checkpoints have them, below `experts` of the table's source."""
    match form:
        case "separate":
            experts(table.within("experts.{expert}", ""), table.sizes["exp"])
        case "fused":
            fused_experts(table.within("experts", ""))
        case "fused, inputs first":
            fused_experts_inputs_first(table.within("experts", ""))
