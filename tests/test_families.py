"""Recognizing models from `config.json`: every decision and refusal on the way. `test_every_model.py` has the trees."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import published_models
import pytest
import tiny_models

from slicecast.configs import families, maxtext
from slicecast.configs.families import gemma, llama, mixtral
from slicecast.convert.errors import ConfigError, SlicecastError, TargetError, UnsupportedArchitectureError
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import InterleaveHalves, Scale, Split, Stride, Transpose
from slicecast.convert.mapping.rules import LayerAxis, Layers, Model, ModelOptions, Rule
from slicecast.convert.mapping.target import Layout, Leaf, leaves

Config = dict[str, Any]


def published(name: str) -> Config:
    """The published config of a model, without the quantization that rules do not depend on."""
    return {key: value for key, value in published_models.load(name).config.items() if key != "quantization_config"}


DEEPSEEK_V3 = published("deepseek3-671b")
KIMI_K2 = published("kimi-k2-1t")
LLAMA_2_7B = published("llama2-7b")
LLAMA_3_8B = published("llama3-8b")
LLAMA_3_1_8B = published("llama3.1-8b")
GPT_OSS_20B = published("gpt-oss-20b")
GPT_OSS_120B = published("gpt-oss-120b")
LLAMA_3_2_1B: Config = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}

# Kimi-K2.5 and K2.6: the text model in a wrapper.
KIMI_K26: Config = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "text_config": {key: value for key, value in KIMI_K2.items() if key != "architectures"},
    "vision_config": {"vt_hidden_size": 1152},
    "tie_word_embeddings": False,
}


def target(model: Model, layout: Layout) -> dict[str, Leaf]:
    """The leaves by path; no path twice."""
    found = [leaf for rule in model.rules for leaf in leaves(rule, layout)]
    assert len({leaf.path for leaf in found}) == len(found)
    return {leaf.path: leaf for leaf in found}


def rule(model: Model, suffix: str) -> Rule:
    (found,) = [rule for rule in model.rules if rule.target.endswith(suffix)]
    return found


def source(leaf: Leaf, coordinate: tuple[int, ...]) -> str:
    """The name of the tensor at a coordinate."""
    assert isinstance(leaf.rule.source, str)
    return leaf.source(leaf.rule.source, coordinate)


# ---- All families


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_each_rule_fits_its_tensor(name: str) -> None:
    for each in tiny_models.model(name).rules:
        element = ops.target_shape(each.ops, each.shape)
        assert len(each.axes) == len(element)
        assert each.dtype in (None, "float32")


def changed(config: Config) -> Iterator[tuple[str, Config, Config]]:
    """Each whole number of a config and of its sections: its name, the config without it, and with a text instead."""
    for name, value in config.items():
        if isinstance(value, dict):
            for inner, without, wrong in changed(value):
                yield inner, config | {name: without}, config | {name: wrong}
        elif isinstance(value, int):
            yield name, {key: other for key, other in config.items() if key != name}, config | {name: "text"}


def recognized(config: Config) -> Sequence[Rule] | str:
    """The rules for a config, or the message of the error."""
    try:
        return families.recognize(config).rules
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_fields_are_checked_or_do_not_matter(name: str) -> None:
    """Without a field there is a default, or an error that names a field; as a text it is refused, or not used."""
    rules, checked = tiny_models.model(name).rules, 0
    for field, without, wrong in changed(tiny_models.CONFIGS[name]):
        found = recognized(without)
        assert not isinstance(found, str) or (found.startswith("config.json") and "field '" in found)
        found = recognized(wrong)
        assert found == rules or f"field '{field}' is 'text'" in found
        checked += found != rules
    assert checked >= 6


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_no_tensor_of_the_model_is_ignored(name: str) -> None:
    model = tiny_models.model(name)
    for tensor in tiny_models.tensors(model, 1):
        assert [ignore.why for ignore in model.ignores if ignore.matches(tensor)] == []


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_leaves_that_are_made_up_are_named(name: str) -> None:
    notes = [note for note in tiny_models.model(name).notes if "made up" in note]
    expected = "leaves in which everything is 1 are made up: MaxText's norm has a scale, and DeepSeek's has none"
    assert notes == ([expected] if name == "deepseek-v4" else [])


# ---- Layouts


@pytest.mark.parametrize("axis", [0, 1])
def test_the_scan_axis_is_where_it_is_asked_for(axis: int) -> None:
    """Of every leaf but the router's bias, whose layers MaxText always has first; experts stay in front."""
    found = target(families.recognize(KIMI_K2), Layout(True, axis))
    root = "params/params/decoder/moe_layers"
    assert found[f"{root}/self_attention/wq_a/kernel"].shape == ((60, 7168, 1536) if axis == 0 else (7168, 60, 1536))
    assert found[f"{root}/DeepSeekMoeBlock_0/MoeBlock_0/gate/bias"].shape == (60, 384)
    experts = found[f"{root}/DeepSeekMoeBlock_0/MoeBlock_0/wo"]
    assert experts.shape == ((60, 384, 2048, 7168) if axis == 0 else (384, 60, 2048, 7168))
    assert source(experts, (7, 300) if axis == 0 else (300, 7)) == "model.layers.8.mlp.experts.300.down_proj.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_save_dtype_is_that_of_all_but_the_routers_bias(dtype: str) -> None:
    found = target(families.recognize(KIMI_K2), Layout(True, 1, dtype))
    assert {leaf.dtype for path, leaf in found.items() if not path.endswith("bias")} == {dtype}
    assert {leaf.dtype for path, leaf in found.items() if path.endswith("bias")} == {"float32"}


# ---- DeepSeek and Kimi


def test_the_wrapper_has_the_same_leaves_under_a_prefix() -> None:
    plain, wrapped = families.recognize(KIMI_K2), families.recognize(KIMI_K26)
    for scan_layers in (True, False):
        inner, outer = (target(model, Layout(scan_layers)) for model in (plain, wrapped))
        assert [(p, leaf.shape, leaf.axes) for p, leaf in outer.items()] == [
            (p, leaf.shape, leaf.axes) for p, leaf in inner.items()
        ]
    assert [each.source for each in wrapped.rules] == [f"language_model.{each.source}" for each in plain.rules]
    assert [each.ops for each in wrapped.rules] == [each.ops for each in plain.rules]


def reasons(config: Config, name: str) -> list[str]:
    return [ignore.why for ignore in families.recognize(config).ignores if ignore.matches(name)]


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.blocks.0.wqkv.weight",
        "vision_tower.patch_embed.pos_emb.weight",
        "mm_projector.proj.0.weight",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_only_the_wrapper_leaves_vision_out(name: str) -> None:
    (why,) = reasons(KIMI_K26, name)
    assert "text only" in why
    assert reasons(KIMI_K2, name) == []
    assert reasons(KIMI_K26, f"language_model.{name}") == []


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_multi_token_prediction_layers_are_left_out(prefix: str) -> None:
    config = DEEPSEEK_V3
    if prefix:
        config = KIMI_K26 | {"text_config": KIMI_K26["text_config"] | {"num_nextn_predict_layers": 1}}
    for tail in ("eh_proj.weight", "embed_tokens.weight", "mlp.experts.3.up_proj.weight", "shared_head.norm.weight"):
        (why,) = reasons(config, f"{prefix}model.layers.61.{tail}")
        assert "multi-token prediction" in why
        assert reasons(config, f"{prefix}model.layers.60.{tail}") == []
        assert reasons(config, f"{prefix}model.layers.610.{tail}") == []
        assert reasons(config, f"{prefix}model.layers.62.{tail}") == []
    assert reasons(KIMI_K2, "model.layers.61.eh_proj.weight") == []


def test_each_of_several_prediction_layers_is_left_out() -> None:
    config = DEEPSEEK_V3 | {"num_nextn_predict_layers": 2}
    found = [len(reasons(config, f"model.layers.{layer}.enorm.weight")) for layer in (59, 60, 61, 62, 63)]
    assert found == [0, 0, 1, 1, 0]


def test_only_dense_or_only_expert_layers() -> None:
    dense = target(families.recognize(KIMI_K2 | {"first_k_dense_replace": 61}), Layout(True))
    assert not [path for path in dense if "moe_layers" in path]
    assert dense["params/params/decoder/dense_layers/mlp/wi_0/kernel"].shape == (7168, 61, 18432)
    experts = target(families.recognize(KIMI_K2 | {"first_k_dense_replace": 0}), Layout(True))
    assert not [path for path in experts if "dense_layers" in path]
    assert experts["params/params/decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo"].shape == (384, 61, 2048, 7168)


def test_expert_layers_begin_after_the_dense_ones() -> None:
    found = target(families.recognize(DEEPSEEK_V3), Layout(False))
    places = ("dense_layers_0", "dense_layers_2", "moe_layers_0", "moe_layers_57")
    names = [source(found[f"params/params/decoder/{place}/self_attention/wq_a/kernel"], ()) for place in places]
    assert names == [f"model.layers.{layer}.self_attn.q_a_proj.weight" for layer in (0, 2, 3, 60)]


# ---- gpt-oss


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B], ids=["20b", "120b"])
def test_layers_of_a_cycle_are_stacked_by_kind(config: Config) -> None:
    """Element b of the stack of kind p is layer 2b + p; unscanned leaves have the numbers of the source."""
    model = families.recognize(config)
    scanned, unscanned = (target(model, Layout(scan_layers)) for scan_layers in (True, False))
    pairs = config["num_hidden_layers"] // 2
    for kind in (0, 1):
        leaf = scanned[f"params/params/decoder/layers/layers_{kind}/GptOssAttention/sinks"]
        assert leaf.shape == (64, pairs)
        names = [source(leaf, (pair,)) for pair in range(pairs)]
        assert names == [f"model.layers.{layer}.self_attn.sinks" for layer in range(kind, 2 * pairs, 2)]
    for layer in range(2 * pairs):
        leaf = unscanned[f"params/params/decoder/layers_{layer}/GptOssAttention/sinks"]
        assert source(leaf, ()) == f"model.layers.{layer}.self_attn.sinks"


@pytest.mark.parametrize("cycle", [1, 4, 6])
def test_a_cycle_of_any_length(cycle: int) -> None:
    """Five cycles after three layers that are no part of them."""
    scanned, unscanned = {}, {}
    for kind in range(cycle):
        layers = Layers(3 + kind, (LayerAxis("layers", 5, cycle),), f"blocks/layers_{kind}")
        rule = Rule("x.{layer}.y", (7,), "decoder/{layers}/z", (), ("norm",), layers)
        (leaf,) = leaves(rule, Layout(True))
        assert (leaf.shape, leaf.axes) == ((7, 5), ("norm", "layers"))
        scanned[leaf.path] = [source(leaf, (index,)) for index in range(5)]
        unscanned |= {leaf.path: source(leaf, ()) for leaf in leaves(rule, Layout(False))}
    root = "params/params/decoder"
    for kind in range(cycle):
        names = [f"x.{3 + kind + cycle * index}.y" for index in range(5)]
        assert scanned.pop(f"{root}/blocks/layers_{kind}/z") == names
    assert scanned == {}
    assert unscanned == {f"{root}/layers_{layer}/z": f"x.{layer}.y" for layer in range(3, 3 + 5 * cycle)}


def test_gate_and_up_are_the_even_and_odd_columns_of_one_tensor() -> None:
    model = families.recognize(GPT_OSS_20B)
    for first, leaf in enumerate(("wi_0", "wi_1")):
        for suffix, axis in (("", 2), ("_bias", 1)):
            rules = [each for each in model.rules if each.target.endswith(f"/{leaf}{suffix}")]
            assert {each.source for each in rules} == {f"model.layers.{{layer}}.mlp.experts.gate_up_proj{suffix}"}
            assert {each.ops for each in rules} == {(Stride(axis, first, 2),)}


def test_an_odd_number_of_gpt_oss_layers_is_refused() -> None:
    config = {key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"} | {"num_hidden_layers": 23}
    with pytest.raises(ConfigError, match=r"field 'num_hidden_layers' is 23.*cycles of 2"):
        families.recognize(config)
    assert families.recognize(config | {"num_hidden_layers": 22}).family == "gpt_oss"


# ---- Llama


def test_tied_weights_are_written_twice() -> None:
    """All of MaxText's Llama models have an output layer of their own."""
    model = families.recognize(LLAMA_3_2_1B)
    embedding, head = rule(model, "token_embedder/embedding"), rule(model, "logits_dense/kernel")
    assert embedding.source == head.source == "model.embed_tokens.weight"
    assert ops.target_shape(head.ops, head.shape) == (2048, 128256)
    assert len(reasons(LLAMA_3_2_1B, "lm_head.weight")) == 1
    assert rule(families.recognize(LLAMA_3_1_8B), "logits_dense/kernel").source == "lm_head.weight"
    assert reasons(LLAMA_3_1_8B, "lm_head.weight") == []


def test_the_head_dim_of_the_config_counts() -> None:
    model = families.recognize(LLAMA_3_2_1B | {"head_dim": 96})
    query = rule(model, "query/kernel")
    assert query.shape == (32 * 96, 2048)
    assert ops.target_shape(query.ops, query.shape) == (2048, 32, 96)
    assert Scale(96**-0.5) in query.ops
    assert rule(families.recognize(LLAMA_3_2_1B | {"head_dim": None}), "query/kernel").shape == (2048, 2048)


def test_as_many_key_heads_as_query_heads_unless_told_otherwise() -> None:
    config = {key: value for key, value in LLAMA_2_7B.items() if key != "num_key_value_heads"}
    assert rule(families.recognize(config), "key/kernel").shape == (4096, 4096)


ROPE3 = LLAMA_3_1_8B["rope_scaling"]
OLD_ROPE3 = {"type": "llama3", "factor": 8.0}
HAS, HAS_NOT = "config.json has that scaling", "config.json has no special rotary embedding"
LEFT_OUT = "leaves out the frequency scaling"


@pytest.mark.parametrize(
    ("fields", "model_name", "rope_type", "interleaved", "note"),
    [
        ({"rope_scaling": ROPE3}, None, None, True, HAS),
        ({"rope_scaling": OLD_ROPE3}, None, None, True, HAS),
        ({"rope_parameters": ROPE3}, None, None, True, HAS),
        ({"rope_parameters": ROPE3, "rope_scaling": None}, None, None, True, HAS),
        ({"rope_scaling": None}, None, None, False, HAS_NOT),
        ({}, None, None, False, HAS_NOT),
        ({"rope_parameters": {"rope_type": "default"}}, None, None, False, HAS_NOT),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, None, False, HAS_NOT),
        ({"rope_scaling": ROPE3}, "llama3.1-8b", None, True, "--model_name=llama3.1-8b"),
        ({"rope_scaling": None}, "llama3.1-8b", None, True, "--model_name=llama3.1-8b"),
        ({"rope_scaling": None}, "llama3.1-70b", None, True, "--model_name=llama3.1-70b"),
        # The name decides before the type, as in MaxText.
        ({"rope_scaling": None}, "llama3.1-8b", "default", True, "--model_name=llama3.1-8b and --rope_type=default"),
        ({"rope_scaling": None}, "llama3-8b", None, False, "--model_name=llama3-8b"),
        ({"rope_scaling": None}, "mistral-7b", None, False, "--model_name=mistral-7b"),
        ({"rope_scaling": ROPE3}, "llama3.3-70b", None, False, LEFT_OUT),
        ({"rope_parameters": ROPE3}, "llama3.3-70b", None, False, LEFT_OUT),
        (
            {"rope_scaling": ROPE3},
            "llama3.3-70b",
            "llama3.1",
            True,
            "--model_name=llama3.3-70b and --rope_type=llama3.1",
        ),
        ({"rope_scaling": None}, None, "llama3.1", True, "--rope_type=llama3.1"),
        ({"rope_scaling": None}, None, "default", False, "--rope_type=default"),
        ({"rope_scaling": ROPE3}, None, "default", False, LEFT_OUT),
    ],
)
def test_the_rotary_layout(
    fields: Config, model_name: str | None, rope_type: str | None, interleaved: bool, note: str
) -> None:
    config = {key: value for key, value in LLAMA_3_8B.items() if key != "rope_scaling"} | fields
    model = families.recognize(config, ModelOptions(model_name=model_name, rope_type=rope_type))
    scale = Scale(128**-0.5)
    rotary = (InterleaveHalves(),) if interleaved else ()
    for part, heads, tail in (("query", 32, (*rotary, scale)), ("key", 8, rotary), ("value", 8, ())):
        assert rule(model, f"{part}/kernel").ops == (Transpose(), Split(1, (heads, 128)), *tail)
    (found,) = model.notes
    assert note in found
    assert ("llama3.1" in found) == (interleaved or note == LEFT_OUT)
    assert (LEFT_OUT in found) == (note == LEFT_OUT)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_only_some_families_scale_queries(name: str) -> None:
    """Those whose MaxText model does not scale the attention logits."""
    config = tiny_models.CONFIGS[name]
    queries = [each for each in tiny_models.model(name).rules if each.target.endswith("/query/kernel")]
    scaled = [each for each in queries if any(isinstance(op, Scale) for op in each.ops)]
    scaling = (*llama.ARCHITECTURES, *mixtral.ARCHITECTURES, *gemma.ARCHITECTURES[:2])
    assert scaled == (queries if config["architectures"][0] in scaling else [])


# ---- Refusals


def test_unknown_architectures() -> None:
    for value in (None, [], ["GPT2LMHeadModel"], ["Foo", "Bar"]):
        with pytest.raises(UnsupportedArchitectureError) as error:
            families.recognize(LLAMA_2_7B | {"architectures": value, "model_type": None})
        for name in (*(value or ["(none given)"]), *families.supported_architectures()):
            assert name in str(error.value)
    with pytest.raises(UnsupportedArchitectureError):
        families.recognize({})


@pytest.mark.parametrize("name", [name for name in published_models.names() if "weaver" not in name])
def test_the_model_type_counts_where_there_are_no_architectures(name: str) -> None:
    config = published(name)
    without = {key: value for key, value in config.items() if key != "architectures"}
    assert families.recognize(without).rules == families.recognize(config).rules


def test_an_unknown_model_type() -> None:
    config = {key: value for key, value in LLAMA_2_7B.items() if key != "architectures"}
    with pytest.raises(UnsupportedArchitectureError, match="'gpt2'"):
        families.recognize(config | {"model_type": "gpt2"})


@pytest.mark.parametrize("value", ["LlamaForCausalLM", 7, {"a": 1}, [["LlamaForCausalLM"]]], ids=str)
def test_architectures_that_are_no_list_of_names(value: Any) -> None:
    with pytest.raises(SlicecastError) as error:
        families.recognize(LLAMA_2_7B | {"architectures": value})
    assert "architecture" in str(error.value)


def test_one_known_architecture_among_others_is_enough() -> None:
    assert families.recognize(LLAMA_2_7B | {"architectures": ["Foo", "LlamaForCausalLM"]}).family == "llama"


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (LLAMA_2_7B, "num_key_value_heads", 0),
        (LLAMA_2_7B, "num_key_value_heads", "8"),
        (LLAMA_2_7B, "head_dim", 0),
        (LLAMA_2_7B, "head_dim", 128.0),
        (LLAMA_2_7B, "attention_bias", True),
        (LLAMA_2_7B, "mlp_bias", True),
        (LLAMA_2_7B, "tie_word_embeddings", "false"),
        (LLAMA_2_7B, "rope_scaling", "llama3"),
        (LLAMA_2_7B, "rope_parameters", [1]),
        (DEEPSEEK_V3, "moe_layer_freq", 2),
        (DEEPSEEK_V3, "attention_bias", True),
        (DEEPSEEK_V3, "q_lora_rank", "1536"),
        (DEEPSEEK_V3, "first_k_dense_replace", -1),
        (DEEPSEEK_V3, "num_nextn_predict_layers", True),
        (DEEPSEEK_V3, "n_shared_experts", "1"),
        (DEEPSEEK_V3, "tie_word_embeddings", 1),
        (KIMI_K26, "text_config", "text"),
        (GPT_OSS_20B, "attention_bias", False),
        (GPT_OSS_20B, "layer_types", ["full_attention", "sliding_attention"] * 12),
        (GPT_OSS_20B, "layer_types", ["sliding_attention", "full_attention"] * 11),
        (GPT_OSS_20B, "layer_types", "sliding_attention"),
        (GPT_OSS_20B, "tie_word_embeddings", True),
    ],
)
def test_values_that_no_rule_covers_are_named(config: Config, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"field '{field}'"):
        families.recognize(config | {field: value})


def test_errors_in_the_wrapped_config_say_where() -> None:
    text = {key: value for key, value in KIMI_K26["text_config"].items() if key != "hidden_size"}
    with pytest.raises(ConfigError, match=r"config\.json, text_config: field 'hidden_size'"):
        families.recognize(KIMI_K26 | {"text_config": text})


# ---- The check against MaxText


def check(model_name: str, found: Mapping[str, Leaf], layout: Layout = Layout(True)) -> str:  # noqa: B008
    """The message with which a set of leaves is refused."""
    with pytest.raises(TargetError) as error:
        maxtext.check(model_name, layout, found.values())
    assert f"--model_name={model_name}" in str(error.value)
    assert "--override_model_config" in str(error.value)
    return str(error.value)


def llama_leaves() -> dict[str, Leaf]:
    return target(families.recognize(LLAMA_3_1_8B), Layout(True))


def test_missing_leaves_are_reported() -> None:
    found = llama_leaves()
    del found["params/params/decoder/logits_dense/kernel"]
    message = check("llama3.1-8b", found)
    assert "1 leaves differ" in message
    assert "'params/params/decoder/logits_dense/kernel' is missing" in message


def test_surplus_leaves_are_reported() -> None:
    found = llama_leaves()
    extra = Rule("x", (3,), "decoder/extra", (), ("norm",))
    found["extra"] = leaves(extra, Layout(True))[0]
    message = check("llama3.1-8b", found)
    assert "1 leaves differ" in message
    assert "'params/params/decoder/extra' is not in MaxText's model" in message


def test_misshapen_leaves_are_reported() -> None:
    found = target(families.recognize(LLAMA_3_1_8B | {"vocab_size": 128257}), Layout(True))
    message = check("llama3.1-8b", found)
    assert "2 leaves differ" in message
    assert (
        "'params/params/token_embedder/embedding' is [128257, 4096], in MaxText's model it is [128256, 4096]" in message
    )


def test_another_models_name_is_reported_briefly() -> None:
    message = check("llama2-7b", target(families.recognize(KIMI_K2), Layout(False)), Layout(False))
    assert len(message) < 2000


@pytest.mark.parametrize("model_name", ["llama3.1-9b", "", "../0.2.5/llama2-7b", "llama2-7b.json"])
def test_unknown_model_names(model_name: str) -> None:
    with pytest.raises(TargetError) as error:
        maxtext.check(model_name, Layout(True), [])
    for known in maxtext.model_names():
        assert known in str(error.value)


def test_a_model_with_its_layers_in_front_fits_too() -> None:
    layout = Layout(True, 0)
    maxtext.check("kimi-k2-1t", layout, target(families.recognize(KIMI_K2), layout).values())
    check("llama3.1-8b", target(families.recognize(LLAMA_3_8B | {"vocab_size": 32000}), layout), layout)


@pytest.mark.parametrize(("model_name", "other"), [("llama3.1-70b", LLAMA_3_1_8B), ("deepseek3-671b", KIMI_K2)])
def test_the_size_must_be_that_of_the_name(model_name: str, other: Config) -> None:
    for layout in (Layout(True), Layout(False), Layout(True, 0)):
        check(model_name, target(families.recognize(other), layout), layout)
