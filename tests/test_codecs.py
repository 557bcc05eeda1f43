"""How tensors are stored: detection, the announced formats, and the values, against integers and golden vectors."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from slicecast.convert.codecs import detect, pack_quantized, plain, quantization_config
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.pack_quantized import PackQuantizedInt4
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import (
    DuplicateTensorError,
    MissingPartnerError,
    MissingTensorError,
    ShapeError,
    SlicecastError,
    UnsupportedFormatError,
)
from slicecast.convert.source.reader import Span
from slicecast.convert.source.safetensors_header import DTYPE_BITS, TensorInfo

Array = npt.NDArray[Any]

GOLDEN = Path(__file__).parent / "golden" / "quant"
BF16 = np.dtype(ml_dtypes.bfloat16)
INT4 = QuantizationConfig("compressed-tensors pack-quantized", 32, None)


def info(name: str, dtype: str, *shape: int, file: str = "a.safetensors") -> TensorInfo:
    return TensorInfo(name, file, dtype, shape, 1000, int(np.prod(shape)) * DTYPE_BITS[dtype] // 8)


def tensors(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {tensor.name: tensor for tensor in infos}


def packed(rows: int = 6, columns: int = 64, groups: int = 2, scale: str = "BF16") -> dict[str, TensorInfo]:
    """The headers of a packed weight whose parts lie in three files."""
    return tensors(
        info("m.weight_packed", "I32", rows, -(-columns // 8), file="a.safetensors"),
        info("m.weight_scale", scale, rows, groups, file="b.safetensors"),
        info("m.weight_shape", "I32", 2, file="c.safetensors"),
    )


def find(
    stored: dict[str, TensorInfo], shape: tuple[int, ...] = (6, 64), config: QuantizationConfig | None = INT4
) -> StoredTensor:
    return detect.find("m.weight", shape, stored, config)


# ---- Detection: what is accepted


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
@pytest.mark.parametrize("config", [None, INT4], ids=["unannounced", "announced"])
def test_plain_tensors(dtype: str, name: str, config: QuantizationConfig | None) -> None:
    """A plain tensor is plain, whatever the checkpoint announces: ignore lists are never asked."""
    found = find(tensors(info("m.weight", dtype, 6, 64)), config=config)
    assert found.name == "m.weight"
    assert found.shape == (6, 64)
    assert found.codec == plain.Plain(name)
    assert found.codec.description == name
    assert not found.codec.changes_values
    assert found.names == ("m.weight",)
    assert found.unread == ()
    (part,) = found.parts
    assert (part.dtype.name, part.shape) == (name, (6, 64))
    assert found.row_bytes == 64 * part.dtype.itemsize
    assert part.span(2, 5) == Span("a.safetensors", 1000 + 2 * found.row_bytes, 3 * found.row_bytes)


@pytest.mark.parametrize("name", ["m.weight", "m.bias", "m.e_score_correction_bias", "weight"])
def test_the_name_need_not_end_in_weight(name: str) -> None:
    found = detect.find(name, (7,), tensors(info(name, "F32", 7)), None)
    assert found.codec == plain.Plain("float32")
    assert found.parts[0].row_bytes == 4


@pytest.mark.parametrize(("scale", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_packed_tensors_and_partners_in_other_files(scale: str, dtype: str) -> None:
    found = find(packed(scale=scale))
    assert found.name == "m.weight"
    assert found.shape == (6, 64)
    assert found.codec == PackQuantizedInt4(columns=64, group_size=32)
    assert found.codec.description == "int4 pack-quantized, group 32"
    assert found.codec.changes_values
    assert found.names == ("m.weight_packed", "m.weight_scale", "m.weight_shape")
    assert found.unread == ("m.weight_shape",)
    words, scales = found.parts
    assert (words.dtype.name, words.shape) == ("uint8", (6, 32))
    assert (scales.dtype.name, scales.shape) == (dtype, (6, 2))
    assert words.span(1, 3) == Span("a.safetensors", 1032, 64)
    assert scales.span(1, 3) == Span("b.safetensors", 1000 + 2 * scales.dtype.itemsize, 4 * scales.dtype.itemsize)
    assert found.row_bytes == 32 + 2 * scales.dtype.itemsize


def test_the_stored_shape_is_optional() -> None:
    stored = packed()
    del stored["m.weight_shape"]
    assert find(stored).unread == ()


@pytest.mark.parametrize(
    ("columns", "groups", "group_size"), [(64, 1, 64), (64, 2, 32), (64, 8, 8), (96, 3, 32), (24, 8, 3)]
)
def test_the_group_size_follows_from_the_shapes(columns: int, groups: int, group_size: int) -> None:
    config = replace(INT4, group_size=None)
    assert find(packed(6, columns, groups), (6, columns), config).codec == PackQuantizedInt4(columns, group_size)


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 100])
def test_channel_scales_cover_the_padding(columns: int) -> None:
    """Rows are padded to whole words; one scale a row has a group of the padded length."""
    codec = find(packed(6, columns, 1), (6, columns)).codec
    assert codec == PackQuantizedInt4(columns, -(-columns // 8) * 8)
    assert codec.description == "int4 pack-quantized, channel"


# ---- Detection: what is refused


def refusal(
    kind: type[SlicecastError],
    stored: dict[str, TensorInfo],
    *words: str,
    shape: tuple[int, ...] = (6, 64),
    config: QuantizationConfig | None = INT4,
) -> None:
    with pytest.raises(SlicecastError) as error:
        find(stored, shape, config)
    assert type(error.value) is kind
    for word in words:
        assert word in str(error.value)


def test_a_tensor_that_is_nowhere() -> None:
    refusal(MissingTensorError, {}, "'m.weight'", "[6, 64]", "Download")
    refusal(MissingTensorError, tensors(info("m.weight_shape", "I32", 2)), "'m.weight'")
    with pytest.raises(MissingTensorError, match=r"'m\.bias'"):
        detect.find("m.bias", (6,), tensors(info("m.bias_scale", "BF16", 6, 1)), None)


def test_a_scale_without_its_weight() -> None:
    stored = packed()
    del stored["m.weight_packed"]
    refusal(MissingPartnerError, stored, "b.safetensors", "'m.weight_scale'", "'m.weight_packed'", "Download")


def test_a_packed_weight_without_its_scale() -> None:
    stored = packed()
    del stored["m.weight_scale"]
    refusal(MissingPartnerError, stored, "a.safetensors", "'m.weight_packed'", "'m.weight_scale'", "Download")


def test_a_weight_that_is_there_twice() -> None:
    refusal(
        DuplicateTensorError, packed() | tensors(info("m.weight", "BF16", 6, 64)), "'m.weight'", "'m.weight_packed'"
    )


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"BF16", "F16", "F32"}))
@pytest.mark.parametrize("config", [None, INT4], ids=["unannounced", "announced"])
def test_dtypes_that_are_no_plain_numbers(dtype: str, config: QuantizationConfig | None) -> None:
    """FP8 with its scale, and FP8 without: never read as numbers."""
    stored = tensors(info("m.weight", dtype, 6, 64))
    refusal(UnsupportedFormatError, stored, "a.safetensors", "'m.weight'", dtype, "BF16", config=config)
    stored |= tensors(info("m.weight_scale", "F32", 6, 1), info("m.weight_scale_inv", "F32", 1, 1))
    refusal(UnsupportedFormatError, stored, "a.safetensors", "'m.weight'", dtype, config=config)


@pytest.mark.parametrize("shape", [(6, 63), (64, 6), (6,), (6, 64, 1), (384,)])
def test_plain_tensors_of_another_shape(shape: tuple[int, ...]) -> None:
    refusal(
        ShapeError, tensors(info("m.weight", "BF16", 6, 64)), "'m.weight'", "[6, 64]", str(list(shape)), shape=shape
    )


@pytest.mark.parametrize("shape", [(6, 65), (6, 56), (5, 64), (64, 6), (6,), (6, 64, 1)])
def test_packed_tensors_of_another_shape(shape: tuple[int, ...]) -> None:
    refusal(ShapeError, packed(), "a.safetensors", "'m.weight_packed'", shape=shape)


@pytest.mark.parametrize("dtype", ["I64", "U32", "U8", "F32"])
def test_packed_words_are_int32(dtype: str) -> None:
    stored = packed() | tensors(info("m.weight_packed", dtype, 6, 8))
    refusal(ShapeError, stored, "a.safetensors", dtype)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("BF16", (5, 2)),
        ("BF16", (2, 6)),
        ("BF16", (6,)),
        ("BF16", (6, 2, 1)),
        ("BF16", (6, 0)),
        ("BF16", (6, 3)),
        ("BF16", (6, 5)),
        ("BF16", (6, 128)),
        ("F8_E4M3", (6, 2)),
        ("U8", (6, 2)),
        ("F64", (6, 2)),
    ],
)
def test_scales_that_do_not_fit(dtype: str, shape: tuple[int, ...]) -> None:
    stored = packed() | tensors(info("m.weight_scale", dtype, *shape, file="b.safetensors"))
    refusal(ShapeError, stored, "b.safetensors", "'m.weight_scale'", dtype, str(list(shape)))


@pytest.mark.parametrize("announced", [16, 64, 128])
def test_group_sizes_must_be_those_announced(announced: int) -> None:
    refusal(ShapeError, packed(), "b.safetensors", "32", str(announced), config=replace(INT4, group_size=announced))
    assert find(packed(groups=1), config=replace(INT4, group_size=announced)).codec == PackQuantizedInt4(64, 64)


@pytest.mark.parametrize("partner", ["weight_zero_point", "weight_g_idx"])
def test_asymmetric_and_reordered_weights(partner: str) -> None:
    stored = packed() | tensors(info(f"m.{partner}", "I32", 1, 2))
    refusal(UnsupportedFormatError, stored, "'m.weight_packed'", f"'m.{partner}'", "not supported")


def test_packed_weights_that_nothing_announces() -> None:
    refusal(UnsupportedFormatError, packed(), "'m.weight_packed'", "quantization_config", config=None)


def test_packed_weights_of_a_format_that_no_codec_covers() -> None:
    config = QuantizationConfig("x", None, "'gptq'")
    refusal(UnsupportedFormatError, packed(), "'m.weight_packed'", "'gptq'", config=config)
    # Tensors that are stored plainly are still read.
    assert find(tensors(info("m.weight", "BF16", 6, 64)), config=config).codec == plain.Plain("bfloat16")


# ---- What a checkpoint announces


SCHEME: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 32,
    "num_bits": 4,
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}
KIMI: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["re:.*lm_head.*"],
    "config_groups": {"group_0": {"input_activations": None, "targets": ["Linear"], "weights": SCHEME}},
}


def scheme(**changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(KIMI)
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": KIMI},
        {"compression_config": KIMI},
        {"text_config": {"quantization_config": KIMI}},
        {"text_config": {"compression_config": KIMI}},
        {"quantization_config": None, "text_config": {"quantization_config": KIMI}},
        {"quantization_config": KIMI, "text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"quantization_config": KIMI, "compression_config": {"quant_method": "fp8"}},
        {"text_config": "none", "quantization_config": KIMI},
        {"quantization_config": KIMI | {"quant_method": "compressed_tensors"}},
        {"quantization_config": KIMI | {"quant_method": "Compressed-Tensors"}},
        {"quantization_config": {key: value for key, value in KIMI.items() if key != "quant_method"}},
    ],
    ids=range(11),
)
def test_where_and_how_it_is_announced(config: dict[str, Any]) -> None:
    assert quantization_config.read(config) == QuantizationConfig("compressed-tensors pack-quantized", 32, None)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {}}, {"text_config": None}])
def test_nothing_announced(config: dict[str, Any]) -> None:
    assert quantization_config.read(config) is None


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (scheme(num_bits=8), "8-bit int"),
        (scheme(num_bits=None), "None-bit"),
        (scheme(type="float"), "4-bit float"),
        (scheme(symmetric=False), "asymmetric"),
        (scheme(actorder="group"), "actorder group"),
        (scheme(actorder="weight"), "actorder weight"),
        (KIMI | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (KIMI | {"format": "mixed-precision"}, "mixed-precision"),
        (KIMI | {"format": None}, "compressed-tensors"),
        (KIMI | {"config_groups": {}}, "pack-quantized"),
        (KIMI | {"config_groups": None}, "pack-quantized"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "MXFP4"}, "'mxfp4'"),
        ({}, "compressed-tensors"),
    ],
)
def test_formats_that_no_codec_covers(config: dict[str, Any], word: str) -> None:
    found = quantization_config.read({"quantization_config": config})
    assert found is not None
    assert found.refusal is not None
    assert word in found.refusal
    assert found.group_size is None
    refusal(UnsupportedFormatError, packed(), "'m.weight_packed'", word, config=found)


def test_one_group_among_several_is_refused() -> None:
    config = copy.deepcopy(KIMI)
    config["config_groups"]["group_1"] = {"weights": SCHEME | {"num_bits": 8}}
    found = quantization_config.read({"quantization_config": config})
    assert found is not None
    assert found.refusal is not None


@pytest.mark.parametrize(
    ("schemes", "group_size"),
    [
        ([SCHEME], 32),
        ([SCHEME | {"group_size": 128}], 128),
        ([SCHEME, SCHEME], 32),
        ([SCHEME, SCHEME | {"group_size": 64}], None),
        ([SCHEME | {"strategy": "channel", "group_size": None}], None),
        ([SCHEME, SCHEME | {"strategy": "channel", "group_size": None}], 32),
    ],
    ids=range(6),
)
def test_the_announced_group_size(schemes: list[dict[str, Any]], group_size: int | None) -> None:
    groups = {f"group_{i}": {"weights": weights} for i, weights in enumerate(schemes)}
    found = quantization_config.read({"quantization_config": KIMI | {"config_groups": groups}})
    assert found == QuantizationConfig("compressed-tensors pack-quantized", group_size, None)


@pytest.mark.parametrize("group", [None, "Linear", ["weights"], {"weights": "int4"}, {"weights": [4]}], ids=str)
def test_groups_that_are_no_groups(group: Any) -> None:
    """A config that makes no sense is a format that no codec covers, not a crash."""
    found = quantization_config.read({"quantization_config": KIMI | {"config_groups": {"group_0": group}}})
    assert found is not None
    assert found.refusal is not None


# ---- Values


def decode(
    codec: PackQuantizedInt4 | plain.Plain, parts: list[Array], dtype: Any = jnp.bfloat16, *, transposed: bool = False
) -> Array:
    """One tensor's rows, as the device step would decode them."""
    run = jax.jit(lambda *arrays: codec.decode(arrays, dtype=dtype, transposed=transposed))
    values: Array = np.asarray(run(*(jnp.asarray(part[None]) for part in parts)))[0]
    return values


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def round_to_bf16(x: Array) -> Array:
    """The bits of finite float32 values rounded to nearest even, with integer arithmetic."""
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def expected_float32(words: Array, scale: Array, columns: int) -> Array:
    """Nibble by nibble; the product is exact in float64, so it is rounded once."""
    rows, groups = scale.shape
    out = np.empty((rows, columns), np.float32)
    group_size = columns // groups if groups > 1 else columns
    for r, c in np.ndindex(rows, columns):
        value = (int(words[r, c // 8]) >> 4 * (c % 8) & 15) - 8
        out[r, c] = np.float32(value * float(scale[r, c // group_size]))
    return out


def random_weight(rows: int, columns: int, groups: int, dtype: Any, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (rows, -(-columns // 8)), np.uint32)
    return words, (rng.standard_normal((rows, groups)) * 0.01).astype(dtype)


@pytest.mark.parametrize(
    ("columns", "groups", "scale"),
    [
        (64, 2, BF16),
        (64, 2, np.float16),
        (64, 2, np.float32),
        (64, 8, BF16),
        (24, 8, BF16),
        (96, 3, BF16),
        (64, 1, BF16),
        (40, 1, np.float32),
        (13, 1, BF16),
        (13, 1, np.float16),
        (1, 1, BF16),
        (7, 1, np.float32),
        (100, 1, BF16),
    ],
    ids=str,
)
def test_packed_values(columns: int, groups: int, scale: Any) -> None:
    rows = 5
    words, scales = random_weight(rows, columns, groups, scale)
    codec = find(packed(rows, columns, groups), (rows, columns), replace(INT4, group_size=None)).codec
    assert isinstance(codec, PackQuantizedInt4)
    parts = [words.view(np.uint8), scales]
    wanted = expected_float32(words, scales, columns)
    assert np.array_equal(bits(decode(codec, parts, jnp.float32)), bits(wanted))
    assert np.array_equal(bits(decode(codec, parts, transposed=True)), round_to_bf16(wanted).T)


@pytest.mark.parametrize(("columns", "groups"), [(36, 3), (12, 2), (20, 4), (30, 10)])
def test_groups_over_columns_that_do_not_fill_their_words(columns: int, groups: int) -> None:
    """Refused from the headers, or decoded: never a crash after the first byte is written."""
    rows = 4
    words, scales = random_weight(rows, columns, groups, BF16)
    try:
        found = find(packed(rows, columns, groups), (rows, columns), replace(INT4, group_size=None))
    except SlicecastError as error:
        assert type(error) in (ShapeError, UnsupportedFormatError)  # noqa: PT017
        assert "'m.weight" in str(error)  # noqa: PT017
        return
    assert isinstance(found.codec, PackQuantizedInt4)
    assert np.array_equal(
        bits(decode(found.codec, [words.view(np.uint8), scales], jnp.float32)),
        bits(expected_float32(words, scales, columns)),
    )


def golden() -> list[Path]:
    return sorted(GOLDEN.glob("CT_pack_quantized_int4_sym_*.npz"))


def test_the_golden_vectors_are_there() -> None:
    names = [path.name for path in golden()]
    assert len(names) == 3
    for word in ("channel", "float16", "group32"):
        assert any(word in name for name in names)


@pytest.mark.parametrize("path", golden(), ids=lambda path: path.stem)
def test_the_library_decodes_alike(path: Path) -> None:
    """compressed-tensors' own words, scales and result, in whole and by blocks of rows."""
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        words, scales, wanted = data["t.p"], data["t.s"], data["expected"]
    assert meta["exact"]
    if "s" in meta["bf16"]:
        scales = scales.view(BF16)
    rows, columns = meta["shape"]
    assert wanted.shape == (rows, columns)
    header = {"bfloat16": "BF16", "float16": "F16"}[scales.dtype.name]
    config = replace(INT4, group_size=meta["args"]["g"])
    found = find(packed(rows, columns, scales.shape[1], header), (rows, columns), config)
    assert isinstance(found.codec, PackQuantizedInt4)
    parts = [
        part.view(data.reshape(-1).view(np.uint8), 0, rows)
        for part, data in zip(found.parts, (words, scales), strict=True)
    ]
    assert np.array_equal(bits(decode(found.codec, parts)), wanted)
    assert np.array_equal(bits(decode(found.codec, parts, transposed=True)), wanted.T)
    for start, stop in ((0, 1), (3, 40), (rows - 1, rows)):
        block = [part[start:stop] for part in parts]
        assert np.array_equal(bits(decode(found.codec, block, transposed=True)), wanted[start:stop].T)


def test_the_example_of_the_specification() -> None:
    """quantized-formats.md 2.4: q = -8..7 with the scale 0x3C4A."""
    words = np.array([[0x76543210, 0xFEDCBA98, 0x88888888, 0x88888888]], np.uint32)
    scale = np.array([[0x3C4A]], np.uint16).view(BF16)
    found = bits(decode(PackQuantizedInt4(32, 32), [words.view(np.uint8), scale]))[0]
    assert [f"{value:04X}" for value in found[:4]] == ["BDCA", "BDB1", "BD98", "BD7C"]
    assert not found[16:].any()


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_values(stored: str, dtype: str, transposed: bool) -> None:
    """All values of 16 bits, and float32s around every rounding to bfloat16; one rounding, ties to even."""
    every = np.arange(1 << 16, dtype=np.uint16)
    if stored == "F32":
        tails = np.array([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        x = ((every[::7].astype(np.uint32) << 16)[:, None] | tails).reshape(-1).view(np.float32)
    else:
        x = every.view(BF16 if stored == "BF16" else np.float16)
    with np.errstate(invalid="ignore"):
        usual = np.isfinite(x) & ((x == 0) | (np.abs(x.astype(np.float64)) >= 2.0**-126))
    x = x[usual]
    x = x[: len(x) // 4 * 4].reshape(4, -1)
    found = detect.find("m.weight", x.shape, tensors(info("m.weight", stored, *x.shape)), None)
    assert isinstance(found.codec, plain.Plain)
    y = decode(found.codec, [x], jnp.dtype(dtype), transposed=transposed)
    wanted = x.astype(np.float32)
    wanted_bits = round_to_bf16(wanted) if dtype == "bfloat16" else wanted.view(np.uint32)
    assert y.dtype.name == dtype
    assert np.array_equal(bits(y), wanted_bits.T if transposed else wanted_bits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_of_the_same_dtype_keep_every_bit(dtype: str) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    if dtype == "float32":
        x = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x1234).view(np.float32)
    y = decode(plain.Plain(dtype), [x.reshape(256, 256)], jnp.dtype(dtype))
    assert np.array_equal(bits(y), bits(x.reshape(256, 256)))


def test_codecs_are_static_arguments() -> None:
    """They are equal and hash alike where they are the same, for they are part of what is compiled once."""
    assert hash(PackQuantizedInt4(64, 32)) == hash(PackQuantizedInt4(64, 32))
    assert (
        len({PackQuantizedInt4(64, 32), PackQuantizedInt4(64, 32), PackQuantizedInt4(64, 64), plain.Plain("float32")})
        == 3
    )
    assert pack_quantized.is_packed("m", packed())
    assert not pack_quantized.is_packed("m", tensors(info("m.weight", "BF16", 6, 64)))
