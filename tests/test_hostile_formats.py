"""Damaged, absurd and malicious checkpoints in every format: defined values on both paths, or an error of ours.

What is defined: arithmetic is that of float32, so NaN in gives NaN out, and infinities and overflow are what IEEE 754
says. An error names the file and the tensor. There is never another exception, and no wrong tensor is ever guessed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import stored
from samples import FLOATS, SAMPLES, Array, Sample

from slicecast.convert.errors import ShapeError, SlicecastError, UnsupportedFormatError

LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_normal)

# Where a format keeps floats that multiply its values.
FLOAT_SCALES = {
    "fp8 blocks": "m.weight_scale_inv",
    "fp8 a row": "m.weight_scale",
    "fp8 a tensor": "m.weight_scale",
    "fp8 e5m2": "m.weight_scale",
    "int8 asymmetric": "m.weight_scale",
    "int4": "m.weight_scale",
    "int4 asymmetric": "m.weight_scale",
    "int8 packed asymmetric": "m.weight_scale",
    "int6 asymmetric": "m.weight_scale",
    "gptq v1": "m.scales",
    "gptq v2": "m.scales",
    "gptq desc_act": "m.scales",
    "awq": "m.scales",
    "bnb nf4": "m.weight.absmax",
}
POWERS_OF_TWO = {
    "fp8 blocks ue8m0": "m.scale",
    "mxfp8": "m.weight_scale_inv",
    "mxfp4 packed": "m.weight_scale",
    "mxfp4 i8": "m.scale",
    "mxfp4 gpt-oss": "m.gate_up_proj_scales",
}


def filled(sample: Sample, part: str, value: Any, dtype: str | None = None) -> Sample:
    """A sample of which one part has the same number everywhere."""
    old_dtype, array = sample.tensors[part]
    dtype = dtype or old_dtype
    number = np.uint8(value) if dtype in ("U8", "F8_E8M0", "F8_E4M3") else np.array(value).astype(FLOATS[dtype])
    return sample.replaced(**{part: (dtype, np.full(array.shape, number))})


def unscaled(sample: Sample, part: str, one: Any, directory: Path, dtype: str | None = None) -> Array:
    """What a sample's values are where its scales are one: its codes, float32."""
    filled(sample, part, one, dtype).write(directory)
    values = stored.expected(directory, sample.name, sample.shape)
    assert len(np.unique(values[~np.isnan(values)])) > 3
    return values


# ---- Scales


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 0.0, -0.0, LARGEST, -LARGEST, SMALLEST, -1.0], ids=str)
@pytest.mark.parametrize("name", FLOAT_SCALES)
def test_scales_of_all_kinds(tmp_path: Path, name: str, scale: float) -> None:
    """A NaN makes its values NaN; an infinity makes them infinite, but zeros NaN; a zero makes zeros with signs."""
    sample, part = SAMPLES[name], FLOAT_SCALES[name]
    values = unscaled(sample, part, 1, tmp_path / "codes", "F32")
    with np.errstate(all="ignore"):
        wanted = values * np.float32(scale)
    if np.isnan(scale):
        assert np.isnan(wanted).all()
    filled(sample, part, scale, "F32").write(tmp_path / "hostile")
    samples.assert_decodes(tmp_path / "hostile", sample.name, sample.shape, wanted)


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-14, 65504.0, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("name", [name for name in FLOAT_SCALES if name != "bnb nf4"])
def test_float16_scales(tmp_path: Path, name: str, scale: float) -> None:
    """Numbers that are subnormal in float16 are none in float32, and count."""
    sample, part = SAMPLES[name], FLOAT_SCALES[name]
    values = unscaled(sample, part, 1, tmp_path / "codes", "F32")
    with np.errstate(all="ignore"):
        wanted = values * np.float32(scale)
    filled(sample, part, scale, "F16").write(tmp_path / "hostile")
    samples.assert_decodes(tmp_path / "hostile", sample.name, sample.shape, wanted)


@pytest.mark.parametrize("scale", [2.0**-127, 2.0**-149], ids=str)
@pytest.mark.parametrize("name", [name for name in FLOAT_SCALES if name != "bnb nf4"])
def test_subnormal_scales_count_as_they_are_or_as_zero(tmp_path: Path, name: str, scale: float) -> None:
    """XLA and chips take numbers below 2**-126 for zeros of the same sign; the definition does not."""
    sample, part = SAMPLES[name], FLOAT_SCALES[name]
    values = unscaled(sample, part, 1, tmp_path / "codes", "F32")
    filled(sample, part, scale, "F32").write(tmp_path / "hostile")
    exact = values * np.float32(scale)
    assert_exact_or_zero(tmp_path / "hostile", sample, exact)


def assert_exact_or_zero(directory: Path, sample: Sample, exact: Array) -> None:
    """Checks that these are the values of a subnormal scale, or on the chips' path those of a zero of the same sign.

    So a value may be a zero of its sign, and an infinite code, times zero, is NaN.
    """
    samples.assert_same(stored.expected(directory, sample.name, sample.shape), exact)
    found = stored.decode(directory, sample.name, sample.shape, dtype="float32")
    unequal = (found.view(np.uint32) != exact.view(np.uint32)) & ~np.isnan(exact)
    found, exact = found[unequal], exact[unequal]
    assert np.isnan(found[np.isinf(exact)]).all()
    assert (found[np.isfinite(exact)] == 0).all()
    assert np.array_equal(np.signbit(found[np.isfinite(exact)]), np.signbit(exact[np.isfinite(exact)]))


@pytest.mark.parametrize("exponent", [255, 254, 253, 128, 126, 1])
@pytest.mark.parametrize("name", POWERS_OF_TWO)
def test_powers_of_two(tmp_path: Path, name: str, exponent: int) -> None:
    """The largest is 2**127, above which values are infinite; 255 is NaN, and so are its values, zeros too."""
    sample, part = SAMPLES[name], POWERS_OF_TWO[name]
    values = unscaled(sample, part, 127, tmp_path / "codes")
    with np.errstate(all="ignore"):
        wanted = values * (np.float32(np.nan) if exponent == 255 else np.float32(2.0 ** (exponent - 127)))
    if exponent == 255:
        assert np.isnan(wanted).all()
    if exponent == 254:
        assert np.isinf(wanted).any()
    filled(sample, part, exponent).write(tmp_path / "hostile")
    samples.assert_decodes(tmp_path / "hostile", sample.name, sample.shape, wanted)


@pytest.mark.parametrize("name", POWERS_OF_TWO)
def test_the_smallest_power_of_two(tmp_path: Path, name: str) -> None:
    """0 is 2**-127, which is subnormal."""
    sample, part = SAMPLES[name], POWERS_OF_TWO[name]
    values = unscaled(sample, part, 127, tmp_path / "codes")
    filled(sample, part, 0).write(tmp_path / "hostile")
    assert_exact_or_zero(tmp_path / "hostile", sample, values * np.float32(2.0**-127))


@pytest.mark.parametrize("byte", [0x00, 0x80, 0x01, 0x07, 0x7E, 0x7F, 0xFE, 0xFF])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 modelopt"])
def test_scales_of_nvfp4(tmp_path: Path, name: str, byte: int) -> None:
    """Zeros of both signs, subnormals, the largest, NaN of both signs."""
    sample = filled(SAMPLES[name], "m.weight_scale", byte)
    factor = next(part for part in sample.tensors if part.endswith(("global_scale", "scale_2")))
    for value in (1.0, -1.0, 0.0, -0.0, np.inf, np.nan):
        filled(sample, factor, value).write(tmp_path)
        samples.assert_decodes(tmp_path, sample.name, sample.shape)
        values = stored.expected(tmp_path, sample.name, sample.shape)
        if byte & 0x7F == 0x7F or np.isnan(value):
            assert np.isnan(values).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, LARGEST], ids=str)
@pytest.mark.parametrize("part", ["m.scales", "m.biases"])
def test_scales_of_mlx(tmp_path: Path, part: str, value: float) -> None:
    sample = filled(SAMPLES["mlx"], part, value, "F32")
    sample.write(tmp_path)
    samples.assert_decodes(tmp_path, sample.name, sample.shape)
    if np.isnan(value):
        assert np.isnan(stored.expected(tmp_path, sample.name, sample.shape)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, LARGEST], ids=str)
@pytest.mark.parametrize("part", ["m.weight.quant_map", "m.weight.nested_quant_map", "m.weight.nested_absmax"])
def test_factors_of_bitsandbytes(tmp_path: Path, part: str, value: float) -> None:
    sample = filled(SAMPLES["bnb nested"], part, value)
    sample.write(tmp_path)
    samples.assert_decodes(tmp_path, sample.name, sample.shape)
    if np.isnan(value):
        assert np.isnan(stored.expected(tmp_path, sample.name, sample.shape)).all()


# ---- Contents that contradict headers


def refused(directory: Path, sample: Sample, kind: type[SlicecastError], *words: str) -> None:
    """Checks that decoding a sample is refused, with an error of this kind that has these words."""
    sample.write(directory)
    with pytest.raises(SlicecastError) as error:
        stored.decode(directory, sample.name, sample.shape)
    assert type(error.value) is kind
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1, -(2**31)])
def test_groups_that_do_not_exist(tmp_path: Path, group: int) -> None:
    sample = SAMPLES["gptq desc_act"]
    index = sample.tensors["m.g_idx"][1].copy()
    index[5] = group
    words = ("model.safetensors: tensor 'm.qweight' has a partner '.g_idx'", str(group), "2 groups")
    refused(tmp_path, sample.replaced(**{"m.g_idx": ("I32", index)}), ShapeError, *words)


STATE = "m.weight.quant_state.bitsandbytes__nf4"
GOOD_STATE: dict[str, Any] = json.loads(SAMPLES["bnb nested"].tensors[STATE][1].tobytes())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"7",
        b"[]",
        b'"nf4"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(GOOD_STATE).encode()[:-1],
        *(
            json.dumps({key: value for key, value in GOOD_STATE.items() if key != missing}).encode()
            for missing in ("quant_type", "blocksize", "shape", "nested_blocksize", "nested_offset")
        ),
        *(
            json.dumps(GOOD_STATE | {"nested_offset": offset}).encode()
            for offset in (None, "0.05", [0.05], {}, True, 10**400)
        ),
    ],
)
def test_states_that_are_not_what_bitsandbytes_writes(tmp_path: Path, text: bytes) -> None:
    sample = SAMPLES["bnb nested"].replaced(**{STATE: ("U8", np.frombuffer(text, np.uint8))})
    words = ("model.safetensors: tensor 'm.weight' has a partner '.quant_state.bitsandbytes__nf4'", "Download")
    refused(tmp_path, sample, UnsupportedFormatError, *words)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [64, 24]},
        {"shape": [24, 64, 1]},
        {"shape": []},
        {"shape": 1536},
        {"shape": "24x64"},
        {"blocksize": 128},
        {"blocksize": 0},
        {"blocksize": "64"},
        {"quant_type": "fp4"},
        {"quant_type": None},
        {"nested_blocksize": 64},
        {"nested_blocksize": 10**300},
    ],
    ids=str,
)
def test_states_that_lie(tmp_path: Path, fields: dict[str, Any]) -> None:
    sample = SAMPLES["bnb nested"].replaced(**{STATE: samples.state(**GOOD_STATE | fields)})
    words = ("model.safetensors: tensor 'm.weight' has a partner", "says", "but the stored shapes and config.json say")
    refused(tmp_path, sample, UnsupportedFormatError, *words)


@pytest.mark.parametrize("offset", [np.nan, np.inf, -np.inf, 1e300, -1e39, 0, 7], ids=str)
def test_offsets_that_are_numbers(tmp_path: Path, offset: float) -> None:
    """JSON of Python has NaN and infinity; what float32 cannot hold is infinite."""
    sample = SAMPLES["bnb nested"].replaced(**{STATE: samples.state(**GOOD_STATE | {"nested_offset": offset})})
    sample.write(tmp_path)
    samples.assert_decodes(tmp_path, sample.name, sample.shape)
    if np.isnan(offset):
        assert np.isnan(stored.expected(tmp_path, sample.name, sample.shape)).all()
