"""Which codec decodes what is stored, and refusals of what is missing or not supported."""

from dataclasses import replace

import pytest
from headers import SHAPE, changed, info, infos, refusal
from samples import SAMPLES

from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.codecs.awq import Awq
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.bit_stream import Packing
from slicecast.convert.codecs.bitsandbytes import BitsAndBytes4Bit
from slicecast.convert.codecs.gptq import Gptq
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.codecs.mlx import MlxAffine
from slicecast.convert.codecs.plain import Plain
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import (
    DuplicateTensorError,
    MissingPartnerError,
    MissingTensorError,
    SlicecastError,
    UnsupportedFormatError,
)
from slicecast.convert.source.safetensors_header import DTYPE_BITS

# ---- What is accepted


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
@pytest.mark.parametrize("announced", [None, "int4", "fp8 blocks", "gptq v1", "mlx"])
def test_plain_tensors(dtype: str, name: str, announced: str | None) -> None:
    """A plain tensor is plain, whatever the checkpoint announces: ignore lists are never asked."""
    config = None if announced is None else quantization_config.read(SAMPLES[announced].config)
    found = detect.find("m.weight", SHAPE, {"m.weight": info("m.weight", dtype, *SHAPE)}, config)
    assert found.codec == Plain(name)
    assert (found.name, found.shape, found.names, found.unread) == ("m.weight", SHAPE, ("m.weight",), ())
    (part,) = found.parts
    assert (part.dtype.name, part.shape, part.axis) == (name, SHAPE, 0)


def test_plain_tensors_of_a_checkpoint_in_a_refused_format() -> None:
    refused = QuantizationConfig("x", "x", refusal="'x'")
    tensors = {"m.weight": info("m.weight", "BF16", *SHAPE)}
    assert detect.find("m.weight", SHAPE, tensors, refused).codec == Plain("bfloat16")


@pytest.mark.parametrize("name", ["m.weight", "m.bias", "m.e_score_correction_bias", "weight"])
def test_the_name_need_not_end_in_weight(name: str) -> None:
    assert detect.find(name, (7,), {name: info(name, "F32", 7)}, None).codec == Plain("float32")


FLOAT8 = Grouped("", "e4m3", 24, 64, 64)
PACKED = Grouped("", "int4_offset", 24, 64, 32)
MXFP4 = Grouped("mxfp4, group 32", "e2m1", 24, 64, 32, "e8m0")
NVFP4 = Grouped("nvfp4, group 16", "e2m1", 24, 64, 16, "e4m3")
CODECS = {
    "bf16": Plain("bfloat16"),
    "f32": Plain("float32"),
    "fp8 blocks": replace(FLOAT8, description="float8_e4m3, blocks of 16 x 16", group_size=16, rows_per_scale=16),
    "fp8 blocks ue8m0": replace(
        FLOAT8, description="float8_e4m3, blocks of 16 x 16", group_size=16, rows_per_scale=16, scale_format="e8m0"
    ),
    "fp8 a row": replace(FLOAT8, description="float8_e4m3, a scale a row"),
    "fp8 a tensor": replace(FLOAT8, description="float8_e4m3, one scale", rows_per_scale=24),
    "fp8 e5m2": replace(FLOAT8, description="float8_e5m2, a scale a row", code="e5m2"),
    "mxfp8": replace(FLOAT8, description="float8_e4m3, blocks of 1 x 32", group_size=32, scale_format="e8m0"),
    "int8 asymmetric": replace(FLOAT8, description="int8, a scale a row", code="int8", zero="bytes"),
    "int4": replace(PACKED, description="int4 pack-quantized, group 32"),
    "int4 asymmetric": replace(
        PACKED, description="int4 pack-quantized, group 32, asymmetric", zero=Packing(4, 8, dense=True)
    ),
    "int8 packed asymmetric": replace(
        PACKED, description="int8 pack-quantized, group 32, asymmetric", code="int8_offset", zero=Packing(8, 128)
    ),
    "int3": replace(PACKED, description="int3 pack-quantized, group 32", code="int8", packing=Packing(3, 4)),
    "int6 asymmetric": replace(
        PACKED,
        description="int6 pack-quantized, group 32, asymmetric",
        code="int8",
        zero=Packing(6, 32),
        packing=Packing(6, 32),
    ),
    "mxfp4 gpt-oss": replace(MXFP4, transposed=True),
    "mxfp4 packed": MXFP4,
    "mxfp4 i8": MXFP4,
    "mxfp4 f4": MXFP4,
    "mxfp4 u8": MXFP4,
    "nvfp4": replace(NVFP4, global_scale="divide"),
    "nvfp4 modelopt": replace(NVFP4, global_scale="multiply"),
    "gptq v1": Gptq(4, 64, 32, stored_less_one=True),
    "gptq v2": Gptq(8, 64, 32, stored_less_one=False),
    "gptq desc_act": Gptq(4, 64, 32, stored_less_one=True),
    "awq": Awq(64, 32),
    "bnb nf4": BitsAndBytes4Bit("nf4", SHAPE, 64, nested=False),
    "bnb nested": BitsAndBytes4Bit("nf4", SHAPE, 64, nested=True),
    "mlx": MlxAffine(4, 64, 32),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format(name: str) -> None:
    """Its codec, and that it uses up all that is stored: what it leaves over would be refused."""
    sample = SAMPLES[name]
    tensors, announced = changed(name)
    found = detect.find(sample.name, sample.shape, tensors, announced)
    assert found.codec == CODECS[name]
    assert (found.name, found.shape) == (sample.name, sample.shape)
    assert sorted(found.names) == sorted(sample.tensors)
    assert set(found.unread) == {key for key in sample.tensors if key.endswith(".weight_shape")}


@pytest.mark.parametrize("name", SAMPLES)
def test_partners_of_other_tensors_are_left_alone(name: str) -> None:
    sample = SAMPLES[name]
    tensors, announced = changed(name)
    others = {f"other.{key}": info(f"other.{key}", "F64", 3) for key in tensors}
    assert detect.find(sample.name, sample.shape, tensors | others, announced) == detect.find(
        sample.name, sample.shape, tensors, announced
    )


@pytest.mark.parametrize("name", ["fp8 a tensor", "fp8 a row", "mxfp4 packed", "mxfp4 i8", "nvfp4", "bnb nested"])
def test_formats_that_need_no_announcement(name: str) -> None:
    """Dtypes, shapes and names say it all."""
    tensors, announced = changed(name)
    assert detect.find("m.weight", SHAPE, tensors, None) == detect.find("m.weight", SHAPE, tensors, announced)


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "mxfp4 packed", "nvfp4"])
def test_the_stored_shape_is_optional(name: str) -> None:
    """It says what `config.json` says, and is not read."""
    tensors, announced = changed(name, **{"m.weight_shape": ("I64", 2)})
    found = detect.find("m.weight", SHAPE, tensors, announced)
    assert found.unread == ("m.weight_shape",)
    del tensors["m.weight_shape"]
    assert detect.find("m.weight", SHAPE, tensors, announced).unread == ()


def find_int4(columns: int, groups: int, group_sizes: frozenset[int] = frozenset()) -> StoredTensor:
    """A packed weight with so many groups, and announced group sizes."""
    tensors, announced = changed(
        "int4", **{"m.weight_packed": ("I32", 24, -(-columns // 8)), "m.weight_scale": ("F32", 24, groups)}
    )
    assert announced is not None
    return detect.find("m.weight", (24, columns), tensors, replace(announced, group_sizes=group_sizes))


@pytest.mark.parametrize(
    ("columns", "groups", "group_size"),
    [(64, 1, 64), (64, 2, 32), (64, 8, 8), (96, 3, 32), (24, 8, 3), (1, 1, 1), (13, 1, 13), (100, 1, 100)],
)
def test_the_group_size_follows_from_the_shapes(columns: int, groups: int, group_size: int) -> None:
    codec = find_int4(columns, groups).codec
    assert isinstance(codec, Grouped)
    assert codec.group_size == group_size
    assert codec.description == f"int4 pack-quantized, {'channel' if groups == 1 else f'group {group_size}'}"


def test_one_of_several_announcements() -> None:
    assert find_int4(64, 2, frozenset({16, 32, 128})).shape == SHAPE
    # A scale a row is one where only groups are announced too: the checkpoint may have both.
    assert find_int4(64, 1, frozenset({32})).shape == SHAPE
    tensors, announced = changed("int4", **{"m.weight_packed": ("I32", 24, 16)})
    assert announced is not None
    codec = detect.find("m.weight", SHAPE, tensors, replace(announced, bits=frozenset({4, 8}))).codec
    assert codec.description == "int8 pack-quantized, group 32"


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        *((f"m.{name}", True) for name in ("input_scale", "activation_scale", "input_global_scale", "input_scale_ub")),
        *((f"m.{name}", True) for name in ("input_zero_point", "qscale_act", "k_scale", "v_scale", "q_scale")),
        *((f"m.{name}", True) for name in ("k_zero_point", "prob_output_scale", "input_activation_scale")),
        *((f"m.{name}", True) for name in ("output_activation_scale", "k_proj.output_scale", "v_proj.output_scale")),
        *((f"m.{name}", False) for name in ("weight_scale", "scale", "pre_quant_scale", "q_proj.output_scale")),
        *((f"m.{name}", False) for name in ("q_l2_clip.scale", "hc_attn_scale", "weight", "input_scale.weight")),
        ("input_scale", False),
    ],
)
def test_what_only_a_quantized_model_uses(name: str, *, runtime: bool) -> None:
    assert detect.is_runtime_only(name) == runtime


# ---- Tensors that are not there


def test_a_tensor_that_is_nowhere() -> None:
    refusal(MissingTensorError, {}, None, "'m.weight'", "[24, 64]", "Download")
    refusal(MissingTensorError, {"m.weight_shape": info("m.weight_shape", "I32", 2)}, None, "'m.weight'")
    refusal(MissingTensorError, {"m.bias_scale": info("m.bias_scale", "F32", 6, 1)}, None, "'m.bias'", name="m.bias")


@pytest.mark.parametrize(
    ("name", "weight", "scale"),
    [
        ("fp8 blocks", "m.weight", "m.weight_scale_inv"),
        ("fp8 a row", "m.weight", "m.weight_scale"),
        ("int4", "m.weight_packed", "m.weight_scale"),
        ("nvfp4", "m.weight_packed", "m.weight_scale"),
        ("gptq v1", "m.qweight", "m.scales"),
        ("awq", "m.qweight", "m.scales"),
        ("mlx", "m.weight", "m.scales"),
        ("mxfp4 gpt-oss", "m.gate_up_proj_blocks", "m.gate_up_proj_scales"),
    ],
)
def test_a_scale_without_its_weight(name: str, weight: str, scale: str) -> None:
    sample = SAMPLES[name]
    refusal(
        MissingPartnerError,
        *changed(name, drop=weight),
        f"{scale}.safetensors: tensor '{scale}'",
        f"'{sample.name}'",
        "Download",
        name=sample.name,
        shape=sample.shape,
    )


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        (name, partner)
        for name, sample in SAMPLES.items()
        for partner in sample.tensors
        # The weights themselves, and what may be missing.
        if not partner.endswith(("weight", "_packed", "_blocks", "weight_shape", "quant_state.bitsandbytes__nf4"))
        and name != "mxfp4 u8"
    ],
)
def test_a_weight_without_its_partner(name: str, partner: str) -> None:
    """Every partner of every format: the zero points where they are announced, and the order of GPTQ's inputs."""
    sample = SAMPLES[name]
    refusal(
        MissingPartnerError,
        *changed(name, drop=partner),
        f"'{partner}'",
        "Download",
        ".safetensors: tensor",
        name=sample.name,
        shape=sample.shape,
    )


@pytest.mark.parametrize(
    ("name", "partner", "word"),
    [
        ("bnb nf4", "m.weight.quant_state.bitsandbytes__nf4", "'bitsandbytes 4-bit'"),
        ("mxfp4 u8", "m.weight_scale", "'fp8'"),
    ],
)
def test_bytes_of_which_only_a_partner_says_what_they_are(name: str, partner: str, word: str) -> None:
    words = ("m.weight.safetensors: tensor 'm.weight' is stored as U8[", word, "slicecast formats")
    refusal(UnsupportedFormatError, *changed(name, drop=partner), *words)


@pytest.mark.parametrize("name", [name for name in SAMPLES if "m.weight" not in SAMPLES[name].tensors])
def test_a_weight_that_is_there_twice(name: str) -> None:
    sample = SAMPLES[name]
    tensors, announced = changed(name, **{sample.name: ("BF16", *sample.shape)})
    stored_as = next(iter(sample.tensors))
    words = (
        f"{sample.name}.safetensors: tensor '{sample.name}'",
        f"'{stored_as}' in {stored_as}.safetensors",
        "Remove",
    )
    refusal(DuplicateTensorError, tensors, announced, *words, name=sample.name, shape=sample.shape)


# ---- Formats that are not supported


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"BF16", "F16", "F32"}))
@pytest.mark.parametrize("announced", [None, QuantizationConfig("x", "some format")], ids=["unannounced", "announced"])
def test_dtypes_that_are_no_plain_numbers(dtype: str, announced: QuantizationConfig | None) -> None:
    """Without a scale, none of them is ever read as numbers."""
    with pytest.raises(SlicecastError) as error:
        detect.find("m.weight", SHAPE, {"m.weight": info("m.weight", dtype, *SHAPE)}, announced)
    assert "m.weight.safetensors: tensor 'm.weight' is " in str(error.value)
    if dtype in ("F8_E4M3", "F8_E5M2", "I8", "F4"):
        assert type(error.value) is MissingPartnerError
        assert "'m.weight_scale" in str(error.value)
    else:
        assert type(error.value) is UnsupportedFormatError
        if dtype != "U32":  # That one says that MLX would have to be announced.
            word = "announces no quantization" if announced is None else "'some format'"
            assert f"{dtype}[24, 64]" in str(error.value)
            assert word in str(error.value)
            assert "slicecast formats" in str(error.value)


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "I32", "I64", "BOOL", "F64", "U8"])
def test_dtypes_that_no_scale_makes_numbers(dtype: str) -> None:
    tensors, announced = changed("fp8 blocks", **{"m.weight": (dtype, *SHAPE)})
    refusal(UnsupportedFormatError, tensors, announced, f"'m.weight' is stored as {dtype}[24, 64]", "'fp8'", "formats")


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("bf16", "f32")])
def test_checkpoints_in_a_refused_format(name: str) -> None:
    """Whatever is stored, it may mean something else there."""
    sample = SAMPLES[name]
    refused = QuantizationConfig("hqq", "hqq", refusal="'hqq'")
    weight = next(iter(sample.tensors))
    words = (f"{weight}.safetensors: tensor '{weight}'", "'hqq'", "not supported", "slicecast formats")
    refusal(UnsupportedFormatError, infos(sample), refused, *words, name=sample.name, shape=sample.shape)


@pytest.mark.parametrize("partner", ["codes", "scales", "weight_scale", "W_q"])
def test_refused_formats_under_names_of_their_own(partner: str) -> None:
    """Nothing is missing that could be downloaded: the format is named, not the name that our formats have."""
    refused = QuantizationConfig("aqlm", "aqlm", refusal="'aqlm'")
    tensors = {f"m.{partner}": info(f"m.{partner}", "F16", 8, 8)}
    refusal(UnsupportedFormatError, tensors, refused, "'m.weight'", "'aqlm'", "slicecast formats")


@pytest.mark.parametrize("name", ["int4", "int3", "gptq v1", "awq", "mlx"])
def test_packed_words_that_nothing_announces(name: str) -> None:
    """Words do not say how they are packed."""
    weight = next(iter(SAMPLES[name].tensors))
    tensors, announced = changed(name)
    refusal(UnsupportedFormatError, tensors, None, f"{weight}.safetensors: tensor '{weight}'", "config.json")
    assert announced is not None
    refusal(
        UnsupportedFormatError, tensors, QuantizationConfig("fp8", "fp8"), f"{weight}.safetensors: tensor '{weight}'"
    )


@pytest.mark.parametrize(
    ("name", "partner", "dtype"),
    [
        ("int4", "m.weight_g_idx", "I32"),
        ("nvfp4 modelopt", "m.pre_quant_scale", "BF16"),
        ("nvfp4", "m.pre_quant_scale", "BF16"),
        ("nvfp4 modelopt", "m.svdquant_lora_a", "BF16"),
    ],
)
def test_partners_that_change_what_a_weight_means(name: str, partner: str, dtype: str) -> None:
    weight = next(iter(SAMPLES[name].tensors))
    words = (f"{weight}.safetensors: tensor '{weight}' has a partner '{partner}'", "not supported")
    refusal(UnsupportedFormatError, *changed(name, **{partner: (dtype, 64)}), *words)


@pytest.mark.parametrize(("bits", "announced"), [(4, {2}), (4, {3}), (8, {4}), (4, {5, 33, 0})])
def test_widths_of_gptq(bits: int, announced: set[int]) -> None:
    tensors, config = changed("gptq v1" if bits == 4 else "gptq v2")
    assert config is not None
    words = (
        "m.qweight.safetensors: tensor 'm.qweight'",
        f"{' or '.join(map(str, sorted(announced)))} bits",
        "[24, 64]",
    )
    refusal(UnsupportedFormatError, tensors, replace(config, bits=frozenset(announced)), *words)
    # Without an announced width the shapes tell it.
    assert isinstance(detect.find("m.weight", SHAPE, tensors, replace(config, bits=frozenset())).codec, Gptq)
