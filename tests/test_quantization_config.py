"""What checkpoints announce about their quantization: where, how it is spelled, and what is refused by name."""

from collections.abc import Mapping
from typing import Any

import published
import pytest

from slicecast.convert.codecs import quantization_config
from slicecast.convert.codecs.quantization_config import ONE_GROUP, QuantizationConfig

INT4 = published.compressed_tensors("pack-quantized", num_bits=4, group_size=32, strategy="group")
FP8 = published.fp8_blocks()


def read(config: Mapping[str, Any], side_configs: Mapping[str, Any] | None = None) -> QuantizationConfig:
    """What a checkpoint announces, which must be something."""
    found = quantization_config.read(config, side_configs)
    assert found is not None
    return found


def of_section(section: Mapping[str, Any]) -> QuantizationConfig:
    """What a `quantization_config` announces."""
    return read({"quantization_config": section})


# ---- Where


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": INT4},
        {"text_config": {"quantization_config": INT4}},
        {"compression_config": INT4},
        {"text_config": {"compression_config": INT4}},
        {"quantization": {key: value for key, value in INT4.items() if key != "quant_method"}},
        {"quantization_config": None, "text_config": {"quantization_config": INT4}},
        {"quantization_config": {}, "text_config": {"quantization_config": INT4}},
        {"quantization_config": "none", "text_config": {"quantization_config": INT4}},
        {"quantization_config": INT4, "text_config": {"quantization_config": FP8}},
        {"quantization_config": INT4, "compression_config": FP8},
        {"quantization_config": INT4, "text_config": "none"},
        {"quantization_config": INT4, "quantization": published.mlx(4, 64)},
        {"compression_config": INT4, "quantization": published.mlx(4, 64)},
        {"quantization_config": INT4 | {"quant_method": "compressed_tensors"}},
        {"quantization_config": INT4 | {"quant_method": "Compressed-Tensors"}},
        {"quantization_config": {key: value for key, value in INT4.items() if key != "quant_method"}},
    ],
    ids=range(16),
)
def test_places_and_spellings(config: Mapping[str, Any]) -> None:
    assert read(config) == QuantizationConfig(
        "compressed-tensors",
        "compressed-tensors pack-quantized",
        block=(1, 32),
        bits=frozenset({4}),
        group_sizes=frozenset({32}),
    )


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "hf_quant_config.json",
            published.hf_quant_config("NVFP4", group_size=16),
            QuantizationConfig("modelopt", "modelopt NVFP4"),
        ),
        (
            "quantize_config.json",
            {"bits": 4, "group_size": 128, "desc_act": True, "sym": True},
            QuantizationConfig(
                "gptq",
                "gptq gptq",
                bits=frozenset({4}),
                group_sizes=frozenset({128}),
                zero_stored_less_one=True,
                reordered=True,
            ),
        ),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            QuantizationConfig("awq", "awq gemm", bits=frozenset({4}), group_sizes=frozenset({128})),
        ),
    ],
)
def test_files_beside_the_config(file: str, content: Any, expected: QuantizationConfig) -> None:
    assert read({}, {file: content}) == expected
    # What is in config.json says more.
    assert read({"quantization_config": FP8}, {file: content}).method == "fp8"
    for nothing in ({}, [], None, {"quantization": None} if "hf" in file else {}):
        assert quantization_config.read({}, {file: nothing}) is None


def test_a_method_in_a_file_beside_the_config() -> None:
    """AutoRound writes AutoGPTQ's file too, with its own name in it."""
    content = {"quant_method": "auto_round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"}
    assert read({}, {"quantize_config.json": content}).method == "gptq"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": []},
        {"quantization_config": "fp8"},
        {"quantization_config": 8},
        {"text_config": {}},
        {"text_config": None},
        {"text_config": [INT4]},
        {"quantization": None},
        {"quantization": False},
    ],
    ids=str,
)
def test_nothing_announced(config: dict[str, Any]) -> None:
    assert quantization_config.read(config) is None


# ---- What


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (FP8, QuantizationConfig("fp8", "fp8", block=(128, 128))),
        (published.fp8_blocks((32, 32), scale_fmt="ue8m0"), QuantizationConfig("fp8", "fp8", block=(32, 32))),
        (published.FP8_PER_TENSOR, QuantizationConfig("fp8", "fp8")),
        (published.fp8_blocks() | {"weight_block_size": None}, QuantizationConfig("fp8", "fp8")),
        (published.MIMO, QuantizationConfig("fp8", "fp8", block=(128, 128))),
        (published.FBGEMM_FP8, QuantizationConfig("fbgemm-fp8", "fbgemm-fp8")),
        (published.MXFP8, QuantizationConfig("mxfp8", "mxfp8", block=(1, 32))),
        ({"quant_method": "mxfp8"}, QuantizationConfig("mxfp8", "mxfp8", block=(1, 32))),
        (published.GPT_OSS, QuantizationConfig("mxfp4", "mxfp4")),
        ({"quant_method": "MXFP4"}, QuantizationConfig("mxfp4", "mxfp4")),
        (published.bitsandbytes("nf4", nested=True), QuantizationConfig("bitsandbytes", "bitsandbytes 4-bit")),
        ({"load_in_4bit": True}, QuantizationConfig("bitsandbytes", "bitsandbytes 4-bit")),
    ],
    ids=str,
)
def test_methods(section: dict[str, Any], expected: QuantizationConfig) -> None:
    assert of_section(section) == expected


@pytest.mark.parametrize(
    ("layout", "weights", "block", "bits", "group_sizes"),
    [
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, None, set(), set()),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None, set(), set()),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            (128, 128),
            set(),
            set(),
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None, {8}, set()),
        ("int-quantized", {"num_bits": 4, "strategy": "channel", "group_size": -1}, None, {4}, set()),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, (1, 128), {4}, {128}),
        ("pack-quantized", {"num_bits": 3, "strategy": "channel", "group_size": 128}, None, {3}, set()),
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "actorder": "weight"}, (1, 32), {4}, {32}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "actorder": "static"}, (1, 32), {4}, {32}),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", "group_size": 32}, (1, 32), set(), {32}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}, (1, 32), set(), {32}),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}, (1, 16), set(), {16}),
    ],
)
def test_compressed_tensors(
    layout: str, weights: dict[str, Any], block: tuple[int, int] | None, bits: set[int], group_sizes: set[int]
) -> None:
    assert of_section(published.compressed_tensors(layout, **weights)) == QuantizationConfig(
        "compressed-tensors",
        f"compressed-tensors {layout}",
        block=block,
        bits=frozenset(bits),
        group_sizes=frozenset(group_sizes),
        asymmetric=weights.get("symmetric") is False,
    )


@pytest.mark.parametrize(
    ("symmetric", "asymmetric"),
    [([False], True), ([False, False], True), ([False, True], False), ([True], False), ([None], False), ([0], False)],
    ids=str,
)
def test_zero_points_are_missed_only_where_all_integers_have_them(symmetric: list[Any], *, asymmetric: bool) -> None:
    """Floats have none, whatever is said of them."""
    schemes: list[dict[str, Any]] = [{"num_bits": 4, "type": "int", "symmetric": value} for value in symmetric]
    schemes.append({"num_bits": 8, "type": "float", "symmetric": True})
    groups = {f"group_{i}": {"weights": scheme} for i, scheme in enumerate(schemes)}
    assert of_section(INT4 | {"config_groups": groups}).asymmetric == asymmetric
    assert not of_section(INT4 | {"config_groups": {"group_0": {"weights": schemes[-1]}}}).asymmetric


def test_several_groups_of_modules() -> None:
    """All that is announced is possible for each tensor; its shapes say which it is."""
    groups = {
        "group_0": {"format": "pack-quantized", "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}},
        "group_1": {"format": "pack-quantized", "weights": {"num_bits": 8, "group_size": 64, "strategy": "group"}},
        "group_2": {
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]},
        },
    }
    found = of_section(INT4 | {"format": "mixed-precision", "config_groups": groups})
    assert found.refusal is None
    assert (found.bits, found.group_sizes, found.block) == ({4, 8}, {32, 64}, (128, 64))


@pytest.mark.parametrize(
    ("algorithm", "block"),
    [
        ("FP8", None),
        ("FP8_PER_CHANNEL_PER_TOKEN", None),
        ("FP8_PB_WO", (128, 128)),
        ("FP8_BLOCK_SCALES", (128, 128)),
        ("MXFP8", (1, 32)),
        ("NVFP4", None),
        ("W4A16_NVFP4", None),
    ],
)
def test_modelopt(algorithm: str, block: tuple[int, int] | None) -> None:
    expected = QuantizationConfig("modelopt", f"modelopt {algorithm}", block=block)
    section = published.modelopt(algorithm)
    assert of_section(section) == expected
    assert of_section({key: value for key, value in section.items() if key != "quant_method"}) == expected
    assert of_section(section | {"quant_method": "modelopt_fp4"}) == expected
    assert of_section(section | {"quant_algo": algorithm.lower()}) == expected
    assert read({}, {"hf_quant_config.json": published.hf_quant_config(algorithm)}) == expected


def test_modelopt_of_several_algorithms() -> None:
    layers = {
        "model.layers.0": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1": {"quant_algo": "FP8_PB_WO"},
    }
    section = published.modelopt("MIXED_PRECISION") | {"quantized_layers": layers}
    assert of_section(section).block == (128, 128)
    assert of_section(section).refusal is None
    section["quantized_layers"] = layers | {"model.layers.2": {"quant_algo": "NVFP4_AWQ"}}
    assert of_section(section).refusal == "'modelopt NVFP4_AWQ'"


@pytest.mark.parametrize(
    ("changes", "layout", "less_one"),
    [
        ({}, "gptq", True),
        ({"checkpoint_format": None}, "gptq", True),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2", False),
        ({"checkpoint_format": "GPTQ_V2"}, "gptq_v2", False),
        ({"checkpoint_format": None, "format": "gptq_v2"}, "gptq_v2", False),
    ],
    ids=str,
)
def test_versions_of_gptq(changes: dict[str, Any], layout: str, *, less_one: bool) -> None:
    assert of_section(published.gptq(8, 128, desc_act=False) | changes) == QuantizationConfig(
        "gptq",
        f"gptq {layout}",
        bits=frozenset({8}),
        group_sizes=frozenset({128}),
        zero_stored_less_one=less_one,
    )


def test_modules_of_their_own() -> None:
    """GPTQModel's `dynamic` has other numbers for some modules; one that begins with `-:` is not quantized."""
    dynamic = {"-:.*gate.*": {}, "+:.*down.*": {"bits": 8}, ".*up.*": {"group_size": 64}}
    found = of_section(published.gptq(4, -1, desc_act=False) | {"dynamic": dynamic})
    assert (found.bits, found.group_sizes) == ({4, 8}, {ONE_GROUP, 64})


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("auto_round:auto_gptq", ("gptq", "gptq gptq", True)),
        ("auto_round:auto_awq", ("awq", "awq gemm", False)),
        # Their zero points are stored as they are, whatever the name of the second one suggests.
        ("auto_round", ("gptq", "gptq gptq_v2", False)),
        ("auto_round:gptqmodel", ("gptq", "gptq gptq_v2", False)),
    ],
)
def test_auto_round(packing: str, expected: tuple[str, str, bool]) -> None:
    section = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": packing, "sym": True}
    found = of_section(section)
    assert (found.method, found.description, found.zero_stored_less_one) == expected
    assert found.refusal is None


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_mlx(key: str) -> None:
    """mlx-lm writes the same under both names; modules may have numbers of their own, or none."""
    section = published.mlx(4, 64) | {"model.embed_tokens": {"bits": 6, "group_size": 32}, "lm_head": False}
    assert read({key: section}) == QuantizationConfig(
        "mlx", "mlx affine", bits=frozenset({4, 6}), group_sizes=frozenset({32, 64})
    )
    assert read({key: published.mlx(4, 64, "affine")}).refusal is None


# ---- What is refused


@pytest.mark.parametrize(
    "method",
    ["hqq", "aqlm", "vptq", "quip", "higgs", "spqr", "eetq", "exl2", "exl3", "quanto", "sinq", "fp_quant", "bitnet"]
    + ["torchao", "quark", "gemma", "something new"],
)
def test_methods_that_are_refused(method: str) -> None:
    name = method.replace("_", "-")
    assert of_section({"quant_method": method.upper(), "bits": 4}) == QuantizationConfig(
        name, name, refusal=f"'{name}'"
    )


@pytest.mark.parametrize(
    ("section", "word"),
    [
        (INT4 | {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
        (INT4 | {"format": "marlin-24"}, "marlin-24"),
        (INT4 | {"format": "mxfp6-pack-quantized"}, "mxfp6-pack-quantized"),
        (INT4 | {"format": None}, "compressed-tensors None"),
        (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (INT4 | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
        (published.compressed_tensors("pack-quantized", num_bits=4, actorder="group"), "actorder 'group'"),
        (INT4 | {"config_groups": {}}, "pack-quantized"),
        (INT4 | {"config_groups": None}, "pack-quantized"),
        (
            INT4 | {"config_groups": {"g": {"format": "sparse-24-bitmask", "weights": {"num_bits": 4}}}},
            "sparse-24-bitmask",
        ),
        (published.gptq(4, 128, desc_act=False, checkpoint_format="marlin"), "'marlin'"),
        (published.gptq(4, 128, desc_act=False, checkpoint_format="gptq_p"), "'gptq_p'"),
        (published.awq(128) | {"version": "gemv"}, "'gemv'"),
        (published.awq(128) | {"version": "gemv_fast"}, "'gemv_fast'"),
        (published.awq(128) | {"version": "llm-awq"}, "'llm-awq'"),
        (published.awq(128) | {"bits": 8}, "8 bits"),
        (published.modelopt("W4A16_AWQ"), "W4A16_AWQ"),
        (published.modelopt("W4A8_AWQ"), "W4A8_AWQ"),
        (published.modelopt("NVFP4_AWQ"), "NVFP4_AWQ"),
        (published.modelopt("NVFP4_SVD"), "NVFP4_SVD"),
        (published.modelopt("W8A8_SQ_PER_CHANNEL"), "W8A8_SQ_PER_CHANNEL"),
        (published.modelopt("FP8") | {"quant_algo": None}, "modelopt NONE"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        (published.mlx(4, 32, "mxfp4"), "mxfp4"),
        (published.mlx(4, 16, "nvfp4"), "nvfp4"),
        (published.mlx(8, 32, "mxfp8"), "mxfp8"),
        (published.mlx(4, 64) | {"lm_head": {"bits": 8, "mode": "mxfp8"}}, "mxfp8"),
    ],
    ids=str,
)
def test_layouts_that_are_refused(section: dict[str, Any], word: str) -> None:
    found = of_section(section)
    assert found.refusal is not None
    assert word in found.refusal
    assert (found.block, found.bits, found.group_sizes) == (None, frozenset(), frozenset())


def test_sparsity_that_is_none() -> None:
    """Pruned weights whose zeros are stored are stored as others are."""
    assert of_section(INT4 | {"sparsity_config": {"format": "dense"}}) == of_section(INT4)
    assert of_section(INT4 | {"sparsity_config": {}, "transform_config": {}}) == of_section(INT4)


# ---- What makes no sense

ABSURD = [0, -1, -7, 2**31, 10**100, 2.5, 10.0, True, None, "4", "", [], [4], [[4]], {}, {"bits": 4}]


@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_block_sizes_that_make_no_sense(value: Any) -> None:
    """What is no block size announces none."""
    for block in (value, [value, value], [128, value], [value, 128], [128], [128, 128, 128]):
        assert of_section(FP8 | {"weight_block_size": block}).block is None
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [value, 128]}
    assert of_section(published.compressed_tensors("float-quantized", **weights)).block is None


@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_group_sizes_that_make_no_sense(value: Any) -> None:
    found = of_section(published.compressed_tensors("pack-quantized", num_bits=4, group_size=value, strategy="group"))
    assert (found.block, found.group_sizes) == (None, frozenset())
    one_group = {ONE_GROUP} if value == ONE_GROUP else set()
    assert of_section(published.gptq(4, value, desc_act=False)).group_sizes == one_group
    assert of_section(published.awq(value)).group_sizes == one_group
    assert read({"quantization": published.mlx(4, value)}).group_sizes == frozenset()


@pytest.mark.parametrize("value", [0, 1, -4, 9, 33, 10**100])
def test_widths_that_no_codec_unpacks(value: int) -> None:
    for found in (
        of_section(published.compressed_tensors("pack-quantized", num_bits=value, group_size=32)),
        read({"quantization": published.mlx(value, 64)}),
        of_section(published.awq(128) | {"bits": value}),
    ):
        assert found.refusal is not None
        assert f"{value} bits" in found.refusal


@pytest.mark.parametrize("value", [value for value in ABSURD if type(value) is not int], ids=repr)
def test_widths_that_make_no_sense(value: Any) -> None:
    for section in (
        published.compressed_tensors("pack-quantized", num_bits=value, group_size=32),
        published.gptq(value, 128, desc_act=False),
        published.awq(128) | {"bits": value},
    ):
        assert of_section(section).bits == frozenset()
    if not isinstance(value, dict):  # Which would be the numbers of a module called `bits`.
        assert read({"quantization": published.mlx(value, 64)}).bits == frozenset()


@pytest.mark.parametrize("value", [*ABSURD, "pack-quantized", ["weights"]], ids=repr)
def test_sections_that_make_no_sense(value: Any) -> None:
    """Anything in place of anything: never a crash."""
    for section in (
        INT4,
        FP8,
        published.modelopt("MIXED_PRECISION"),
        published.gptq(4, 128, desc_act=False),
        published.bitsandbytes("nf4", nested=True),
        published.mlx(4, 64),
    ):
        for key in [*section, "dynamic", "quantized_layers", "sparsity_config", "transform_config", "packing_format"]:
            for place in ("quantization_config", "quantization"):
                read({place: section | {key: value}})
    for group in (value, {"weights": value}, {"format": value, "weights": INT4}):
        of_section(INT4 | {"config_groups": {"group_0": group}})
