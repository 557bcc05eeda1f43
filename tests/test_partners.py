"""Shapes and dtypes that disagree: with `config.json`, with the announcement, and between a weight and its partners."""

from dataclasses import replace

import pytest
from headers import changed, infos, refusal
from samples import BF16, OUT, SAMPLES

from slicecast.convert.codecs import detect
from slicecast.convert.errors import ShapeError, UnsupportedFormatError


@pytest.mark.parametrize("shape", [(24, 63), (63, 24), (24,), (24, 64, 1), (1536,), (23, 64), (24, 65)], ids=str)
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "mxfp4 gpt-oss"])
def test_weights_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """`config.json` gives another one than what is stored says."""
    with pytest.raises((ShapeError, UnsupportedFormatError), match=r"\.safetensors: tensors? 'm\.") as error:
        detect.find("m.weight", shape, *changed(name))
    assert str(shape[-1]) in str(error.value)


@pytest.mark.parametrize("shape", [(4, 24, 64), (64, 24), (4, 64), (4, 64, 25), (4, 48, 24), (3, 64, 24)], ids=str)
def test_experts_of_another_shape(shape: tuple[int, ...]) -> None:
    words = ("m.gate_up_proj_blocks.safetensors: tensor 'm.gate_up_proj_blocks'", str(list(shape)), "config.json")
    refusal(ShapeError, *changed("mxfp4 gpt-oss"), *words, name="m.gate_up_proj", shape=shape)


# What else of a partner's dtypes is right.
ALSO_RIGHT: dict[str, set[str]] = {
    "m.weight_scale_inv": {"BF16", "F16", "F32", "F8_E8M0", "U8"},
    "m.scale": {"BF16", "F16", "F32", "F8_E8M0", "U8"},
    "m.scales": {"BF16", "F16", "F32"},
    "m.biases": {"BF16", "F16", "F32"},
}


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "U8", "I8", "I32", "I64", "U32", "F8_E4M3", "F8_E8M0", "BOOL"])
@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("int8 asymmetric", "m.weight_zero_point"),
        ("int4 asymmetric", "m.weight_zero_point"),
        ("int4 asymmetric", "m.weight_packed"),
        ("mxfp4 gpt-oss", "m.gate_up_proj_blocks"),
        ("mxfp4 gpt-oss", "m.gate_up_proj_scales"),
        ("nvfp4", "m.weight_global_scale"),
        ("nvfp4 modelopt", "m.weight_scale_2"),
        ("gptq desc_act", "m.qweight"),
        ("gptq desc_act", "m.qzeros"),
        ("gptq desc_act", "m.scales"),
        ("gptq desc_act", "m.g_idx"),
        ("awq", "m.qweight"),
        ("awq", "m.qzeros"),
        ("awq", "m.scales"),
        ("bnb nested", "m.weight.quant_map"),
        ("bnb nested", "m.weight.nested_quant_map"),
        ("bnb nested", "m.weight.nested_absmax"),
        ("mlx", "m.scales"),
        ("mlx", "m.biases"),
    ],
)
def test_dtypes_of_partners(name: str, partner: str, dtype: str) -> None:
    sample = SAMPLES[name]
    stored_dtype, array = sample.tensors[partner]
    tensors, announced = changed(name, **{partner: (dtype, *array.shape)})
    if dtype in ALSO_RIGHT.get(partner, {stored_dtype}):
        assert detect.find(sample.name, sample.shape, tensors, announced).shape == sample.shape
        return
    with pytest.raises((ShapeError, UnsupportedFormatError)) as error:
        detect.find(sample.name, sample.shape, tensors, announced)
    assert f"{partner}.safetensors: tensor '{partner}' is " in str(error.value)
    assert f"{dtype}{list(array.shape)}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "scale", "wrong"),
    [
        ("fp8 blocks", "m.weight_scale_inv", [(2, 3), (3, 4), (4, 2), (8,), (1, 4), (2, 1), (1, 24), (2, 4, 1, 1, 2)]),
        ("fp8 blocks", "m.weight_scale_inv", [(0,), (2, 0), (0, 4), (24, 0), (1, 0), (64,), (24, 64), (1, 2, 4)]),
        ("fp8 a row", "m.weight_scale", [(23, 1), (25, 1), (1, 24), (64, 1), (24, 2), (24, 1, 2), (1, 64), (24, 0)]),
        ("fp8 a tensor", "m.weight_scale", [(2,), (0,), (1, 2), (2, 1)]),
        ("mxfp8", "m.weight_scale_inv", [(24, 3), (24, 1, 2, 2), (2, 24), (23, 2), (24, 4)]),
        ("int4", "m.weight_scale", [(23, 2), (2, 24), (24,), (24, 2, 1), (24, 0), (0, 2), (24, 3), (24, 5), (24, 128)]),
        ("int4 asymmetric", "m.weight_zero_point", [(2, 2), (4, 2), (2, 3), (24, 2), (3, 1), (3,), (3, 2, 1), (0, 2)]),
        ("int8 asymmetric", "m.weight_zero_point", [(23, 1), (1, 24), (24,), (24, 64), (1,), (0, 1)]),
        ("mxfp4 gpt-oss", "m.gate_up_proj_scales", [(4, 24, 1), (4, 24), (3, 24, 2), (4, 2, 24), (4, 24, 2, 1)]),
        ("mxfp4 gpt-oss", "m.gate_up_proj_blocks", [(4, 24, 2, 15), (4, 24, 32), (4, 24, 16, 2), (4, 2, 24, 16)]),
        ("mxfp4 packed", "m.weight_scale", [(24, 1), (24, 4), (2, 24), (24,), (48,), (24, 2, 1)]),
        ("nvfp4", "m.weight_scale", [(24, 2), (24, 3), (4, 24), (24, 4, 1), (96,)]),
        ("nvfp4", "m.weight_global_scale", [(2,), (1, 1), (0,), (24, 1)]),
        ("gptq v1", "m.scales", [(3, 24), (1, 24), (2, 23), (24, 2), (2,), (48,), (2, 24, 1), (0, 24), ()]),
        ("gptq v1", "m.qzeros", [(3, 3), (2, 24), (2, 4), (2, 2), (1, 3), (6,), (0, 3)]),
        ("gptq desc_act", "m.g_idx", [(63,), (65,), (64, 1), (1, 64), (0,), ()]),
        ("awq", "m.scales", [(3, 24), (2, 23), (24, 2), (48,), ()]),
        ("awq", "m.qzeros", [(3, 3), (2, 24), (2, 4), (2, 2), (6,)]),
        ("bnb nf4", "m.weight.absmax", [(23,), (25,), (24, 1), (0,), ()]),
        ("bnb nf4", "m.weight.quant_map", [(15,), (17,), (4, 4), (256,), (0,)]),
        ("bnb nested", "m.weight.nested_quant_map", [(255,), (16,), (16, 16)]),
        ("bnb nested", "m.weight.nested_absmax", [(2,), (0,), (1, 1), ()]),
        ("mlx", "m.biases", [(24, 1), (2, 24), (48,), (24, 2, 1)]),
    ],
)
def test_shapes_of_partners(name: str, scale: str, wrong: list[tuple[int, ...]]) -> None:
    """Transposed, one too many, one too few, of another rank, empty."""
    sample = SAMPLES[name]
    dtype = sample.tensors[scale][0]
    for shape in wrong:
        tensors, announced = changed(name, **{scale: (dtype, *shape)})
        words = (f"{scale}.safetensors: tensor '{scale}' is {dtype}{list(shape)}",)
        refusal(ShapeError, tensors, announced, *words, name=sample.name, shape=sample.shape)


@pytest.mark.parametrize("shape", [(24, 1), (2, 24), (48,), (24, 4), (24, 0), ()], ids=str)
def test_shapes_of_scales_of_mlx(shape: tuple[int, ...]) -> None:
    """The scales' shape must be one of those announced, which says how many bits there are."""
    tensors, announced = changed("mlx", **{"m.scales": ("BF16", *shape)})
    refusal(ShapeError, tensors, announced, "'m.weight'", f"'m.scales' BF16{list(shape)}", "[4] bits", "groups of [32]")


@pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E4M3", "I8", "BOOL"])
@pytest.mark.parametrize("name", ["fp8 blocks", "fp8 a row", "fp8 a tensor", "mxfp8"])
def test_dtypes_of_scales_of_bytes(name: str, dtype: str) -> None:
    scale = list(SAMPLES[name].tensors)[1]
    tensors, announced = changed(name, **{scale: (dtype, *SAMPLES[name].tensors[scale][1].shape)})
    words = (f"{scale}.safetensors: tensor '{scale}' is a scale stored as {dtype}", "BF16, F16, F32, F8_E8M0 or U8")
    refusal(UnsupportedFormatError, tensors, announced, *words)


@pytest.mark.parametrize(
    ("name", "columns"), [("mxfp4 packed", 48), ("mxfp4 packed", 30), ("nvfp4", 40), ("nvfp4 modelopt", 24)]
)
def test_columns_that_are_no_groups(name: str, columns: int) -> None:
    weight, scale, *_ = SAMPLES[name].tensors
    tensors, announced = changed(
        name,
        **{
            weight: ("U8", OUT, -(-columns // 2)),
            scale: (SAMPLES[name].tensors[scale][0], OUT, -(-columns // 16)),
        },
    )
    words = (f"{weight}.safetensors: tensor '{weight}' has {columns} columns", "no groups of")
    refusal(ShapeError, tensors, announced, *words, shape=(OUT, columns))


@pytest.mark.parametrize("announced", [16, 64, 128])
@pytest.mark.parametrize("name", ["int4", "gptq v1", "awq"])
def test_group_sizes_must_be_those_announced(name: str, announced: int) -> None:
    tensors, config = changed(name)
    assert config is not None
    scale = "m.weight_scale" if name == "int4" else "m.scales"
    words = (f"{scale}.safetensors: tensor '{scale}'", str(min(announced, 64)), "quantization_config says")
    refusal(ShapeError, tensors, replace(config, group_sizes=frozenset({announced})), *words)


def test_blocks_must_be_those_announced() -> None:
    tensors, config = changed("fp8 blocks")
    assert config is not None
    words = ("'m.weight_scale_inv' is F32[2, 4]", "[1, 1]", "blocks of 128 x 128, says the quantization_config")
    refusal(ShapeError, tensors, replace(config, block=(128, 128)), *words, "Use the config.json")
    refusal(ShapeError, tensors, None, "'m.weight_scale_inv' is F32[2, 4]", "is [24, 1] or [1, 1]. Use the config.json")


@pytest.mark.parametrize("name", ["fp8 blocks", "fp8 a tensor"])
def test_quantized_are_matrices(name: str) -> None:
    tensors, announced = changed(name, **{"m.weight": ("F8_E4M3", 64)})
    refusal(ShapeError, tensors, announced, "'m.weight' is F8_E4M3[64]", "matrices only", shape=(64,))


def test_the_samples_are_what_their_headers_say() -> None:
    """What the tables above change is right before."""
    for sample in SAMPLES.values():
        for name, (dtype, array) in sample.tensors.items():
            assert infos(sample)[name].nbytes == array.nbytes
            assert (array.dtype == BF16) == (dtype == "BF16")
