"""The values of plain numbers, FP8, INT8, packed integers and four-bit floats.

They are compared with loops written from the formats' definitions, element by element. `check` compares both paths with
them: detection, reader, `prepare` and `decode`; and NumPy's, which `verify` takes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import published
import pytest
import samples
import stored
from samples import BF16, COLUMNS, FLOATS, OUT, SAMPLES, Array, Sample
from scalar import CODES, bits_of_run, check, e2m1, e4m3, e8m0, int8, number, times


def round_to_bf16(x: Array) -> Array:
    """The bits of float32 values rounded to nearest even, with integer arithmetic; of no NaN."""
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


# ---- Plain numbers


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [True, False])
def test_plain_values(tmp_path: Path, dtype: str, *, transposed: bool) -> None:
    """All values of 16 bits, and float32s around every rounding to bfloat16; one rounding, ties to even."""
    every = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "F32":
        tails = np.array([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        x = ((every[::7].astype(np.uint32) << 16)[:, None] | tails).reshape(-1).view(np.float32)
    else:
        x = every.view(FLOATS[dtype])
    with np.errstate(invalid="ignore"):
        usual = np.isfinite(x) & ((x == 0) | (np.abs(x.astype(np.float64)) >= 2.0**-126))
    x = x[usual]
    x = x[: len(x) // 4 * 4].reshape(4, -1)
    stored.write(tmp_path, {"m.weight": (dtype, x)}, {})
    wanted = x.astype(np.float32)
    for result, wanted_bits in (("bfloat16", round_to_bf16(wanted)), ("float32", wanted.view(np.uint32))):
        y = stored.decode(tmp_path, "m.weight", x.shape, dtype=result, transposed=transposed)
        assert y.dtype.name == result
        assert np.array_equal(y.view(wanted_bits.dtype), wanted_bits.T if transposed else wanted_bits)
    assert stored.expected(tmp_path, "m.weight", x.shape).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_of_the_same_dtype_keep_every_bit(tmp_path: Path, dtype: str) -> None:
    """NaNs with their payloads, and subnormal numbers."""
    x = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    if dtype == "F32":
        x = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x1234).view(np.float32)
    x = x.reshape(256, 256)
    stored.write(tmp_path, {"m.weight": (dtype, x)}, {})
    assert stored.decode(tmp_path, "m.weight", (256, 256), dtype=x.dtype.name).tobytes() == x.tobytes()
    assert stored.expected(tmp_path, "m.weight", (256, 256)).tobytes() == x.tobytes()


# ---- Bytes with scales: FP8, INT8


@pytest.mark.parametrize("partner", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("scale", ["F32", "BF16", "F16", "F8_E8M0", "U8"])
def test_every_name_and_dtype_of_a_scale(tmp_path: Path, scale: str, partner: str) -> None:
    """Blocks of 16 x 24, of which the last ones are smaller. Every code occurs."""
    rng = np.random.default_rng(0)
    sample = samples.float8(rng, (2, 3), scale=scale, partner=partner, config=published.fp8_blocks((16, 24)))
    codes = np.arange(OUT * COLUMNS).astype(np.uint8).reshape(OUT, COLUMNS)
    sample = sample.replaced(**{"m.weight": ("F8_E4M3", codes)})
    scales = sample.tensors[f"m.{partner}"][1]
    wanted = check(sample, tmp_path, lambda r, c: times(e4m3(int(codes[r, c])), number(scales[r // 16, c // 24])))
    assert np.count_nonzero(np.isnan(wanted)) == 2 * OUT * COLUMNS // 256


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("shape", "block", "rows", "columns"),
    [
        ((2, 3), (16, 24), 16, 24),
        ((2, 1, 3, 1), (16, 24), 16, 24),
        ((24, 2), (16, 32), 1, 32),
        ((24, 64), (1, 1), 1, 1),
        ((1, 1), (128, 128), 24, 64),
        ((1, 2), (128, 32), 24, 32),
        ((2, 1), (16, 2**31 - 1), 16, 64),
        ((2,), (16, 128), 16, 64),
        ((24, 1), None, 1, 64),
        ((24,), None, 1, 64),
        ((24, 1), (16, 16), 1, 64),
        ((), None, 24, 64),
        ((1,), None, 24, 64),
        ((1, 1), (16, 16), 24, 64),
    ],
    ids=str,
)
def test_every_shape_of_a_scale(
    tmp_path: Path, code: str, shape: tuple[int, ...], block: tuple[int, int] | None, rows: int, columns: int
) -> None:
    config = published.FP8_PER_TENSOR if block is None else published.fp8_blocks(block)
    sample = samples.float8(np.random.default_rng(1), shape, code=code, config=config)
    codes, scales = sample.tensors["m.weight"][1], sample.tensors["m.weight_scale_inv"][1]
    by_block = scales.reshape(-(-OUT // rows), -(-COLUMNS // columns))
    check(sample, tmp_path, lambda r, c: times(CODES[code](int(codes[r, c])), by_block[r // rows, c // columns]))


def test_blocks_are_those_announced_not_those_that_divide(tmp_path: Path) -> None:
    """DeepSeek-V3's `kv_a_proj_with_mqa` in small: 72 rows in blocks of 16 are five, of which the last has eight."""
    rng = np.random.default_rng(2)
    codes, scales = samples.random_bytes(rng, 72, 40), samples.random_scale(rng, (5, 3))
    tensors = {"m.weight": ("F8_E4M3", codes), "m.weight_scale_inv": ("F32", scales)}
    sample = Sample("m.weight", (72, 40), tensors, {"quantization_config": published.fp8_blocks((16, 16))})
    check(sample, tmp_path, lambda r, c: times(e4m3(int(codes[r, c])), scales[r // 16, c // 16]))


@pytest.mark.parametrize("shape", [(24, 1), (24,), (), (2, 4)], ids=str)
def test_zero_points_of_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    codes, scales = samples.random_bytes(rng, OUT, COLUMNS), samples.random_scale(rng, shape, "BF16")
    zeros = samples.random_bytes(rng, *shape).view(np.int8)
    tensors = {
        "m.weight": ("I8", codes),
        "m.weight_scale": ("BF16", scales),
        "m.weight_zero_point": ("I8", zeros),
    }
    config = published.compressed_tensors("int-quantized", num_bits=8, strategy="block", block_structure=[16, 16])
    rows, columns = (16, 16) if shape == (2, 4) else (1 if shape else OUT, COLUMNS)
    by_block = [x.reshape(-(-OUT // rows), -(-COLUMNS // columns)) for x in (zeros, scales)]

    def value(r: int, c: int) -> np.float32:
        zero, scale = (x[r // rows, c // columns] for x in by_block)
        return times(int8(int(codes[r, c])) - int(zero), float(scale))

    check(Sample("m.weight", (OUT, COLUMNS), tensors, {"quantization_config": config}), tmp_path, value)


@pytest.mark.parametrize(
    ("scale_shape", "rows", "columns"),
    [((3, 2, 4), 16, 16), ((3, 24, 1), 1, 64), ((3, 24), 1, 64), ((3, 1, 1), 24, 64), ((3,), 24, 64)],
    ids=str,
)
@pytest.mark.parametrize("name", ["m.gate_up_proj", "m.gate_up_proj.weight"])
def test_several_experts_in_a_tensor(
    tmp_path: Path, name: str, scale_shape: tuple[int, ...], rows: int, columns: int
) -> None:
    rng = np.random.default_rng(4)
    codes, scales = samples.random_bytes(rng, 3, OUT, COLUMNS), samples.random_scale(rng, scale_shape)
    tensors = {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scales)}
    sample = Sample(name, codes.shape, tensors, {"quantization_config": published.fp8_blocks((16, 16))})
    by_block = scales.reshape(3, -(-OUT // rows), -(-COLUMNS // columns))
    check(sample, tmp_path, lambda e, r, c: times(e4m3(int(codes[e, r, c])), by_block[e, r // rows, c // columns]))


# ---- Packed integers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "dense"), [*((bits, True) for bits in range(2, 9)), *((bits, False) for bits in (3, 5, 6, 7))]
)
@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (125, 1), (126, 6)])
def test_packed_integers(tmp_path: Path, bits: int, columns: int, groups: int, *, dense: bool, symmetric: bool) -> None:
    """Rows and groups that end within words; zero points are packed along the rows."""
    rng = np.random.default_rng(bits)
    rows, group_size = 13, columns // groups

    def words(codes: int) -> int:
        return -(-codes * bits // 32) if dense else -(-codes // (32 // bits))

    codes, scales = samples.random_words(rng, rows, words(columns)), samples.random_scale(rng, (rows, groups), "BF16")
    tensors = {"m.weight_packed": ("I32", codes), "m.weight_scale": ("BF16", scales)}
    zeros = samples.random_words(rng, words(rows), groups)
    if not symmetric:
        tensors["m.weight_zero_point"] = ("I32", zeros)
    strategy = "group" if groups > 1 else "channel"
    config = published.compressed_tensors(
        "pack-quantized", num_bits=bits, group_size=group_size if groups > 1 else None, strategy=strategy
    )

    def value(r: int, c: int) -> np.float32:
        g = c // group_size
        code = bits_of_run(codes[r], c, bits, dense=dense)
        zero = 2 ** (bits - 1) if symmetric else bits_of_run(zeros[:, g], r, bits, dense=dense)
        return times(code - zero, float(scales[r, g]))

    check(Sample("m.weight", (rows, columns), tensors, {"quantization_config": config}), tmp_path, value)


@pytest.mark.parametrize("scale", FLOATS)
@pytest.mark.parametrize(
    ("columns", "groups"), [(64, 8), (96, 3), (13, 1), (1, 1), (7, 1), (100, 1), (36, 3), (12, 2), (20, 4), (30, 10)]
)
def test_int4_groups(tmp_path: Path, columns: int, groups: int, scale: str) -> None:
    rng = np.random.default_rng(5)
    words, scales = samples.random_words(rng, 5, -(-columns // 8)), samples.random_scale(rng, (5, groups), scale)
    config = published.compressed_tensors("pack-quantized", num_bits=4, group_size=columns // groups, strategy="group")
    tensors = {"m.weight_packed": ("I32", words), "m.weight_scale": (scale, scales)}
    sample = Sample("m.weight", (5, columns), tensors, {"quantization_config": config})
    group_size = columns // groups
    check(
        sample,
        tmp_path,
        lambda r, c: times((int(words[r, c // 8]) >> 4 * (c % 8) & 15) - 8, float(scales[r, c // group_size])),
    )


def test_the_example_of_packed_integers(tmp_path: Path) -> None:
    """-8 to 7 with the scale 0x3C4A, as compressed-tensors packs and decodes them."""
    words = np.array([[0x76543210, 0xFEDCBA98, 0x88888888, 0x88888888]], np.uint32)
    scale = np.array([[0x3C4A]], np.uint16).view(BF16)
    config = published.compressed_tensors("pack-quantized", num_bits=4, group_size=32, strategy="group")
    tensors = {"m.weight_packed": ("I32", words), "m.weight_scale": ("BF16", scale)}
    stored.write(tmp_path, tensors, {"quantization_config": config})
    found = stored.decode(tmp_path, "m.weight", (1, 32)).view(np.uint16)[0]
    assert [f"{value:04X}" for value in found[:4]] == ["BDCA", "BDB1", "BD98", "BD7C"]
    assert not found[16:].any()


def test_packing_that_the_number_of_words_leaves_open(tmp_path: Path) -> None:
    """Rows of 45 values of 3 bits are five words either way: they are taken as dense, as newer releases write them."""
    rng = np.random.default_rng(11)
    words, scales = samples.random_words(rng, 5, 5), samples.random_scale(rng, (5, 1))
    config = published.compressed_tensors("pack-quantized", num_bits=3, strategy="channel")
    tensors = {"m.weight_packed": ("I32", words), "m.weight_scale": ("F32", scales)}
    sample = Sample("m.weight", (5, 45), tensors, {"quantization_config": config})
    check(sample, tmp_path, lambda r, c: times(bits_of_run(words[r], c, 3) - 4, float(scales[r, 0])))


# ---- Four-bit floats


@pytest.mark.parametrize("name", ["mxfp4 packed", "mxfp4 i8", "mxfp4 f4", "mxfp4 u8"])
def test_mxfp4(tmp_path: Path, name: str) -> None:
    sample = SAMPLES[name]
    (_, codes), (_, scales) = sample.tensors.values()
    codes = codes.view(np.uint8)
    check(
        sample,
        tmp_path,
        lambda r, c: times(e2m1(int(codes[r, c // 2]) >> 4 * (c % 2) & 15), e8m0(int(scales[r, c // 32]))),
    )


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Blocks are [experts, out, groups, bytes], the logical tensor is [experts, in, out]."""
    sample = SAMPLES["mxfp4 gpt-oss"]
    (_, codes), (_, scales) = sample.tensors.values()
    check(
        sample,
        tmp_path,
        lambda e, c, r: times(
            e2m1(int(codes[e, r, c // 32, c % 32 // 2]) >> 4 * (c % 2) & 15), e8m0(int(scales[e, r, c // 32]))
        ),
    )


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 modelopt"])
def test_nvfp4(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """The scale of a group is divided by the global one, or multiplied with it, in float32, before it multiplies."""
    sample = SAMPLES[name]
    (_, codes), (_, scales), (_, factor) = sample.tensors.values()
    factor_name = list(sample.tensors)[2]
    sample = replace(sample, tensors={**sample.tensors, factor_name: ("F32", factor.reshape(shape))})
    one = np.float32(factor.reshape(()))
    # All scales, some of which are negative, NaN or subnormal.
    scales = np.arange(scales.size).astype(np.uint8).reshape(scales.shape) * np.uint8(3)
    sample = sample.replaced(**{"m.weight_scale": ("F8_E4M3", scales)})

    def value(r: int, c: int) -> np.float32:
        scale = np.float32(e4m3(int(scales[r, c // 16])))
        effective = scale / one if name == "nvfp4" else scale * one
        return times(e2m1(int(codes[r, c // 2]) >> 4 * (c % 2) & 15), effective)

    check(sample, tmp_path, value)


def test_nvfp4_divides_as_float32_does(tmp_path: Path) -> None:
    """Where multiplying with the reciprocal, rounded, gives another number: for every significand of a scale."""
    codes = np.full((16, 8), 0x22, np.uint8)  # All elements are one.
    scales = np.arange(0x38, 0x48, dtype=np.uint8)[:, np.newaxis]
    found_differences = 0
    for factor in np.random.default_rng(6).uniform(1, 3000, 50).astype(np.float32):
        tensors = {
            "m.weight_packed": ("U8", codes),
            "m.weight_scale": ("F8_E4M3", scales),
            "m.weight_global_scale": ("F32", np.array([factor])),
        }
        stored.write(tmp_path, tensors, {"quantization_config": published.compressed_tensors("nvfp4-pack-quantized")})
        numbers = np.array([e4m3(int(scale)) for scale in scales[:, 0]], np.float32)
        wanted = np.repeat((numbers / factor)[:, np.newaxis], 16, axis=1)
        samples.assert_same(stored.decode(tmp_path, "m.weight", (16, 16), dtype="float32"), wanted)
        found_differences += np.count_nonzero(wanted[:, 0] != numbers * (np.float32(1) / factor))
    assert found_differences > 100
