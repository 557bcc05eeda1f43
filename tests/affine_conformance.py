"""What the tests of the GPTQ and AWQ kernels share: an oracle, operands, and tests for every implementation."""

import abc
import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from slicecast.kernels.implementation import Implementation

Array = npt.NDArray[Any]
DType = np.dtype[Any]
Kind = Literal["tame", "wild", "special"]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

SMALLEST_NORMAL = 2.0**-126
"""Of float32. XLA and TPUs make smaller operands and results zero."""


def words_of(dtype: DType) -> DType:
    """The unsigned integers of a dtype's size."""
    return np.dtype(f"u{dtype.itemsize}")


def check(actual: Array, codes: Array, scale: Array, zero: Array, *, group_of_row: Array, dtype: DType = BF16) -> None:
    """Asserts that `actual` is what the definition says.

    The product is exact in float64: a difference has 9 significant bits, and a scale 24. It is rounded to float32, and
    from there to `dtype`. NaNs are all equal, and what is below 2**-126 may have become a zero of the same sign.

    Args:
        actual: What an implementation gave, dtype[batch, in, out].
        codes: int64[batch, in, out].
        scale: bfloat16, float16 or float32[batch, groups, out].
        zero: uint8[batch, groups, out].
        group_of_row: int[batch, in].
        dtype: bfloat16 or float32.
    """
    batch = np.arange(len(codes))[:, np.newaxis]
    difference = codes - zero.astype(np.int64)[batch, group_of_row]
    with np.errstate(all="ignore"):
        factor = scale.astype(np.float64)[batch, group_of_row]
        product = difference * factor
        expected = product.astype(np.float32).astype(dtype)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    same = actual.view(words_of(dtype)) == expected.view(words_of(dtype))
    same |= np.isnan(actual) & np.isnan(expected)
    tiny = (np.abs(product) < SMALLEST_NORMAL) | (np.abs(factor) < SMALLEST_NORMAL)
    same |= tiny & (actual == 0) & (np.signbit(actual) == np.signbit(expected))
    wrong = np.argwhere(~same)
    assert not len(wrong), [(tuple(i), actual[tuple(i)], expected[tuple(i)]) for i in wrong[:5]]


def scales(shape: tuple[int, ...], dtype: DType, kind: Kind, random: np.random.Generator) -> Array:
    """Scales that are "tame" (like a model's), "wild" (any bits), or "special" (zeros, infinities, NaN, edges)."""
    if kind == "tame":
        return (random.standard_normal(shape) / 64).astype(dtype)
    word = words_of(dtype)
    if kind == "wild":
        return random.integers(0, np.iinfo(word).max, shape, word, endpoint=True).view(dtype)
    limits = ml_dtypes.finfo(dtype)
    edges = [limits.max, limits.smallest_normal, limits.smallest_subnormal, 0.0, 1.0, np.inf]
    values = np.array([*edges, np.nan], dtype)
    return np.concatenate([values, -values])[random.integers(0, 2 * len(values), shape)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One small weight."""

    rows: int
    columns: int
    group_size: int
    batch: int = 1


class Conformance(abc.ABC):
    """The behavior of an operation, whatever implements it."""

    implementation: Implementation
    interpret: bool | pltpu.InterpretParams = False
    widths: tuple[int, ...]
    """The widths of codes that the format has."""
    cases: tuple[Case, ...]
    """Small weights that the implementation supports, whatever the width, with ragged edges."""

    @abc.abstractmethod
    def pack(self, codes: Array, bits: int) -> Array:
        """Packs codes, int64[batch, in, out], into words, int32[...]."""

    @abc.abstractmethod
    def dequantize(self, words: Array, scale: Array, zero: Array, *, bits: int, group_size: int, dtype: DType) -> Array:
        """Runs the implementation."""

    def run(self, codes: Array, scale: Array, zero: Array, *, bits: int, group_size: int, dtype: DType) -> Array:
        """Packs codes and runs the implementation. An interpreter that looks for races must find none."""
        result = self.dequantize(self.pack(codes, bits), scale, zero, bits=bits, group_size=group_size, dtype=dtype)
        if isinstance(self.interpret, pltpu.InterpretParams):
            assert interpret_pallas_call.races is not None
            assert not interpret_pallas_call.races.races_found
        return result

    def check(
        self,
        case: Case,
        *,
        bits: int,
        scale_dtype: DType = F16,
        dtype: DType = BF16,
        kind: Kind = "wild",
        seed: int = 0,
    ) -> None:
        """Runs the implementation on random operands and compares with the oracle."""
        random = np.random.default_rng(seed)
        codes = random.integers(0, 2**bits, (case.batch, case.rows, case.columns))
        groups = (case.batch, -(-case.rows // case.group_size), case.columns)
        scale = scales(groups, scale_dtype, kind, random)
        zero = random.integers(0, 2**bits, groups, np.uint8)
        actual = self.run(codes, scale, zero, bits=bits, group_size=case.group_size, dtype=dtype)
        group_of_row = np.broadcast_to(np.arange(case.rows) // case.group_size, codes.shape[:2])
        check(actual, codes, scale, zero, group_of_row=group_of_row, dtype=dtype)

    def test_group_sizes_and_ragged_edges(self) -> None:
        """Every way to divide the work, in alternating dtypes and widths."""
        for seed, case in enumerate(self.cases):
            bits = self.widths[seed % len(self.widths)]
            self.check(case, bits=bits, dtype=(BF16, F32)[seed % 2], seed=seed)

    @pytest.mark.parametrize("kind", ["tame", "wild", "special"])
    @pytest.mark.parametrize("scale_dtype", [BF16, F16, F32], ids=str)
    @pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
    def test_scale_values(self, scale_dtype: DType, dtype: DType, kind: Kind) -> None:
        """Every scale dtype, from the values of a model to infinities and subnormal numbers."""
        self.check(self.cases[0], bits=self.widths[0], scale_dtype=scale_dtype, dtype=dtype, kind=kind)

    def test_every_code_in_every_place(self) -> None:
        """The order of the elements, seen without arithmetic: row k of column n holds the code (k + n) % 2**bits."""
        case = self.cases[0]
        groups = (1, -(-case.rows // case.group_size), case.columns)
        for bits in self.widths:
            codes = np.add.outer(np.arange(case.rows), np.arange(case.columns))[np.newaxis] % 2**bits
            actual = self.run(
                codes,
                np.ones(groups, BF16),
                np.zeros(groups, np.uint8),
                bits=bits,
                group_size=case.group_size,
                dtype=F32,
            )
            np.testing.assert_array_equal(actual, codes.astype(np.float32), strict=True)

    def test_every_code_with_every_zero(self) -> None:
        """Row k holds the code k, and column n the zero n, as far as there are codes."""
        for bits in self.widths:
            n = 2**bits
            codes = np.broadcast_to(np.arange(256)[:, np.newaxis] % n, (1, 256, 256))
            zero = (np.arange(256) % n).astype(np.uint8)[np.newaxis, np.newaxis]
            scale = np.full(zero.shape, 0.5, F16)
            actual = self.run(codes, scale, zero, bits=bits, group_size=256, dtype=BF16)
            expected = (codes - zero.astype(np.int64)) / 2
            np.testing.assert_array_equal(actual, expected.astype(BF16), strict=True)
