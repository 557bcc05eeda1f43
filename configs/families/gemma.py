"""Google's Gemma 1, 2 and 3.

MaxText keeps the embedding as Gemma uses it, multiplied by the square root of the hidden size, and norms as what they
multiply with, one more than what is published. The vision tower of Gemma 3 is converted with --use_multimodal.
"""

import ml_dtypes
import numpy as np

from slicecast.configs.families import blocks, siglip
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.ops import Offset, Op, Scale
from slicecast.convert.mapping.rules import Ignore, LayerAxis, Layers, Model, ModelOptions, cycle, stacked
from slicecast.convert.mapping.table import RuleTable

_GEMMA3 = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
ARCHITECTURES = ("GemmaForCausalLM", "Gemma2ForCausalLM", *_GEMMA3)

# MaxText's vocabulary where it is not the published one: rounded up for the chips, or without unused rows.
_VOCABULARIES = {256_000: 256_128, 262_208: 262_144}

# Published configs of Gemma 3 leave out what transformers has as a default.
_GEMMA3_DEFAULTS = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}

# How checkpoints spell the names of Gemma 3: as published, as transformers 5 writes them, which has no `vision_model`,
# and as transformers 5 has them in memory.
_PUBLISHED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_SPELLINGS = (
    _PUBLISHED,
    _PUBLISHED | {"model.vision_tower.vision_model.": "vision_tower."},
    {"model.vision_tower.vision_model.": "model.vision_tower."},
)

_GEMMA3_CYCLE = ("sliding_attention",) * 5 + ("full_attention",)


def model(config: HfConfig, architecture: str, options: ModelOptions) -> Model:
    """The rules for a Gemma checkpoint."""
    text = config.section("text_config") or config
    c = text.with_defaults(_GEMMA3_DEFAULTS) if architecture in _GEMMA3 else text
    c.refuse("attention_bias", False, why="MaxText's Gemma attention has no bias.")
    config.refuse("tie_word_embeddings", True, why="MaxText's Gemma computes logits with the embedding.")
    sizes = blocks.sizes(c, options, **blocks.heads(c), mlp=c.integer("intermediate_size"))
    if options.vocab_size is None:
        sizes["vocab"] = _VOCABULARIES.get(sizes["tokens"], sizes["tokens"])
    table = RuleTable(sizes)
    prefix = "model.language_model" if architecture == "Gemma3ForConditionalGeneration" else "model"
    hidden = c.integer("hidden_size")
    # transformers and MaxText's Gemma 3 multiply by a bfloat16 number.
    normalizer = float(ml_dtypes.bfloat16(hidden**0.5)) if architecture in _GEMMA3 else float(np.float32(hidden**0.5))
    blocks.embedding(table, f"{prefix}.embed_tokens.weight", Scale(normalizer))
    _norm(table, f"{prefix}.norm.weight", "norm", "decoder/decoder_norm/scale")
    layers = c.integer("num_hidden_layers")
    source = f"{prefix}.layers.{{layer}}"
    if architecture == "GemmaForCausalLM":
        _gemma1(table.within(source, "decoder/{layers}", stacked("layers", layers)))
    elif architecture == "Gemma2ForCausalLM":
        _gemma2(c, table, source, layers)
    else:
        blocks.take_turns(c, _GEMMA3_CYCLE, whole=False)
        for kind in _gemma3_layers(layers):
            _gemma3(table.within(source, "decoder/{layers}", kind))
    ignores = [blocks.tied_output(r"(language_model\.)?lm_head\.weight")]
    if options.use_multimodal:
        siglip.add(config.require_section("vision_config"), table, hidden)
    else:
        ignores.append(Ignore(r"(model\.)?(vision_tower|multi_modal_projector)\..*", "vision needs --use_multimodal"))
    return blocks.model("gemma", architecture, c, table, ignores=ignores, spellings=_SPELLINGS)


def _norm(table: RuleTable, source: str, arranged: str, target: str) -> None:
    # In bfloat16 the sum would lose what is below 2**-8 of a scale that is near one.
    table.add(source, arranged, target, Offset(1.0), dtype="float32")


def _scaled_query(head_dim: int) -> tuple[Op, ...]:
    # MaxText does not scale the attention logits: its checkpoints hold scaled queries.
    return (Scale(head_dim**-0.5),)


def _gemma1(layer: RuleTable) -> None:
    _norm(layer, "input_layernorm.weight", "norm", "pre_self_attention_norm/scale")
    _norm(layer, "post_attention_layernorm.weight", "norm", "pre_ffw_norm/scale")
    blocks.attention(layer.within("self_attn", "self_attention"), query=_scaled_query(layer.sizes["kv"]))
    blocks.mlp(layer.within("mlp", "mlp"))


def _gemma2(c: HfConfig, table: RuleTable, source: str, layers: int) -> None:
    """Layers in pairs, one with a sliding window and one without; a pair is one layer of MaxText's model."""
    blocks.take_turns(c, ("sliding_attention", "full_attention"))
    for place, kind in enumerate(("local", "global")):
        pairs = Layers(place, (LayerAxis("layers", layers // 2, 2),), "layers", "layers_{index}")
        layer = table.within(source, "decoder/{layers}", pairs)
        _norm(layer, "input_layernorm.weight", "norm", f"pre_self_attention_norm_{kind}/scale")
        _norm(layer, "post_attention_layernorm.weight", "norm", f"post_self_attention_norm_{kind}/scale")
        _norm(layer, "pre_feedforward_layernorm.weight", "norm", f"pre_ffw_norm_{kind}/scale")
        _norm(layer, "post_feedforward_layernorm.weight", "norm", f"post_ffw_norm_{kind}/scale")
        scalar = c.integer("query_pre_attn_scalar", layer.sizes["kv"])
        blocks.attention(layer.within("self_attn", f"self_attention_{kind}"), query=_scaled_query(scalar))
        blocks.mlp(layer.within("mlp", f"mlp_{kind}"))


def _gemma3_layers(layers: int) -> list[Layers]:
    """Whole cycles, and the layers after them, which stand alone in scanned models too."""
    places = len(_GEMMA3_CYCLE)
    whole = layers // places * places
    rest = [Layers(whole + place, (), f"layers_remainder/layers_{place}") for place in range(layers - whole)]
    return (cycle(whole, places, "layers/layers_{}") if whole else []) + rest


def _gemma3(layer: RuleTable) -> None:
    _norm(layer, "input_layernorm.weight", "norm", "pre_self_attention_norm/scale")
    _norm(layer, "post_attention_layernorm.weight", "norm", "post_self_attention_norm/scale")
    _norm(layer, "pre_feedforward_layernorm.weight", "norm", "pre_ffw_norm/scale")
    _norm(layer, "post_feedforward_layernorm.weight", "norm", "post_ffw_norm/scale")
    attention = layer.within("self_attn", "self_attention")
    blocks.attention(attention)
    _norm(attention, "q_norm.weight", "norm:kv", "query_norm/scale")
    _norm(attention, "k_norm.weight", "norm:kv", "key_norm/scale")
    blocks.mlp(layer.within("mlp", "mlp"))
