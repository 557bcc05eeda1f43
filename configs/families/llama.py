"""Llama 2, 3, 3.1 and 3.3, and Mistral."""

from collections.abc import Iterator

from slicecast.configs.families import blocks
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import InterleaveHalves, Op, Scale
from slicecast.convert.mapping.rules import Ignore, Model, ModelOptions, stacked
from slicecast.convert.mapping.table import RuleTable

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# The prefix of the rotary types, and of the models, of MaxText that rotate neighboring elements. All others rotate
# halves, as Hugging Face does. MaxText 0.2.5 decides when it runs, by the model's name and then by `rope_type`; so its
# llama3.3-70b rotates halves, without Llama 3's scaling of the frequencies, unless it is run with rope_type=llama3.1.
_INTERLEAVED = "llama3.1"


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Llama or Mistral checkpoint."""
    config.refuse("attention_bias", False, why="MaxText's Llama attention has no bias.")
    config.refuse("mlp_bias", False, why="MaxText's Llama MLP has no bias.")
    interleaved, note = _rotates_neighbors(config, options.model_name, options.rope_type)
    table = _table(config, options, interleaved)
    notes = [f"rotary layout {note}"]
    return blocks.model("llama", architecture, config, table, ignores=_ignores(config), notes=notes)


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


def _table(c: HfConfig, options: ModelOptions, interleaved: bool) -> RuleTable:
    sizes = blocks.sizes(c, options, **blocks.heads(c), mlp=c.integer("intermediate_size"))
    table = RuleTable(sizes)
    # All of MaxText's Llama and Mistral models have a separate output layer, so tied weights are written twice.
    tied = c.flag("tie_word_embeddings", False)
    blocks.ends(table, output="model.embed_tokens.weight" if tied else "lm_head.weight")
    layer = table.within("model.layers.{layer}", "decoder/{layers}", stacked("layers", c.integer("num_hidden_layers")))
    blocks.layer_norms(layer)
    rotary: tuple[Op, ...] = (InterleaveHalves(),) if interleaved else ()
    # MaxText does not scale the attention logits: its checkpoints hold queries multiplied by 1 / sqrt(head_dim).
    query = (*rotary, Scale(sizes["kv"] ** -0.5))
    blocks.attention(layer.within("self_attn", "self_attention"), query=query, key=rotary)
    blocks.mlp(layer.within("mlp", "mlp"))
    return table


def _ignores(c: HfConfig) -> Iterator[Ignore]:
    if c.flag("tie_word_embeddings", False):
        yield blocks.tied_output(r"lm_head\.weight")
