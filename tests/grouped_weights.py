"""Made-up weights for the grouped kernel, and what they are worth, in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

from slicecast.kernels.grouped import Code, ScaleFormat, formats

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
U8 = np.dtype(np.uint8)

CODES = get_args(Code)

SCALES: tuple[tuple[ScaleFormat, np.dtype[Any]], ...] = (
    ("float", BF16),
    ("float", F16),
    ("float", F32),
    ("e8m0", U8),
    ("e4m3", U8),
)
"""Every scale format, with every dtype that it can have."""

SPECIAL = {
    BF16: (0x0000, 0x3F80, 0x7F80, 0x7FC0, 0x7F7F, 0x0080, 0x0001),
    F16: (0x0000, 0x3C00, 0x7C00, 0x7E00, 0x7BFF, 0x0400, 0x0001),
    F32: (0x00000000, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7F7FFFFF, 0x00800000, 0x00000001),
}
"""The bits of zero, one, infinity, NaN, the largest, the smallest normal and the smallest subnormal number."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A batch of weights as they are stored.

    Attributes:
      code: How an element is stored.
      scale_format: How a scale is stored.
      codes: uint8[batch, out, bytes].
      scale: [batch, out, groups].
      zero: int8[batch, out, groups], or None.
      divisor: float32[batch], what divides the scales in E4M3; None with other scales.
    """

    code: Code
    scale_format: ScaleFormat
    codes: Array
    scale: Array
    zero: Array | None = None
    divisor: Array | None = None

    @property
    def group_size(self) -> int:
        """Elements of a row that share a scale."""
        return self.codes.shape[2] * 8 // formats.BITS[self.code] // self.scale.shape[2]

    def keywords(self) -> dict[str, Any]:
        """What the implementations take, beside the dtype."""
        significands = None
        if self.divisor is not None:
            significands = jnp.asarray(np.arange(16, dtype=np.float32) / self.divisor[:, None])
        return {
            "codes": jnp.asarray(self.codes),
            "scale": jnp.asarray(self.scale),
            "code": self.code,
            "group_size": self.group_size,
            "scale_format": self.scale_format,
            "zero": None if self.zero is None else jnp.asarray(self.zero),
            "significands": significands,
        }

    def values(self) -> Array:
        """float32[batch, out, in]: what the codes mean, less the zeros."""
        if formats.BITS[self.code] == 4:
            codes = np.stack([self.codes & 15, self.codes >> 4], axis=-1).reshape(*self.codes.shape[:-1], -1)
        else:
            codes = self.codes
        match self.code:
            case "int4_offset":
                values = codes.astype(np.float32) - 8
            case "int8_offset":
                values = codes.astype(np.float32) - 128
            case "int8":
                values = codes.view(np.int8).astype(np.float32)
            case "e2m1":
                values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            case "e4m3":
                values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            case "e5m2":
                values = codes.view(ml_dtypes.float8_e5m2).astype(np.float32)
        if self.zero is not None:
            values = values - np.repeat(self.zero.astype(np.float32), self.group_size, axis=2)
        return values

    def scales(self) -> Array:
        """float32[batch, out, groups]."""
        match self.scale_format:
            case "float":
                return self.scale.astype(np.float32)
            case "e8m0":
                return self.scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
            case "e4m3":
                assert self.divisor is not None
                return self.scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / self.divisor[:, None, None]

    def check(self, actual: Array) -> None:
        """Asserts that `actual`, [batch, in, out], is the product in float32, rounded once to its dtype.

        A subnormal scale or result may count as zero, and any NaN will do for a NaN.
        """
        values, scales = self.values(), self.scales()
        with np.errstate(all="ignore"):
            exact = (values * np.repeat(scales, self.group_size, axis=2)).swapaxes(1, 2)
            flushed = flush((values * np.repeat(flush(scales), self.group_size, axis=2)).swapaxes(1, 2))
            ok = np.isnan(exact) & np.isnan(actual)
            for expected in (exact, flushed):
                rounded = expected.astype(actual.dtype)
                ok |= bits(rounded) == bits(actual)
                ok |= np.isnan(rounded) & np.isnan(actual)
        assert actual.shape == exact.shape
        wrong = [(*index, actual[tuple(index)], exact[tuple(index)]) for index in np.argwhere(~ok)[:5]]
        assert not wrong


def flush(x: Array) -> Array:
    """Zeros, of the same sign, for the subnormal numbers of a float32 array."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def bits(x: Array) -> Array:
    """The bits of a bfloat16 or float32 array."""
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@dataclasses.dataclass(frozen=True)
class Case:
    """The sides of a small weight."""

    rows: int
    columns: int
    group_size: int
    batch: int = 1


def exhaustive(code: Code, scale_format: ScaleFormat, scale_dtype: np.dtype[Any]) -> Weight:
    """Every code in each row, and every scale byte or special scale among the rows: [256, 256], one group."""
    n = np.arange(256)
    codes = np.add.outer(n, np.arange(256 * formats.BITS[code] // 8)).astype(np.uint8)
    if scale_format == "float":
        word = np.uint32 if scale_dtype == F32 else np.uint16
        special = np.array(SPECIAL[scale_dtype], word).view(scale_dtype)
        scale = np.resize(np.concatenate([special, -special]), 256)
    else:
        scale = n.astype(np.uint8)
    divisor = np.array([1792.3], np.float32) if scale_format == "e4m3" else None
    return Weight(code, scale_format, codes[None], scale[None, :, None], divisor=divisor)


def random(
    code: Code, scale_format: ScaleFormat, scale_dtype: np.dtype[Any], case: Case, *, zero: bool = False, seed: int = 0
) -> Weight:
    """Random bytes for everything: scales may be any numbers, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    groups = (case.batch, case.rows, case.columns // case.group_size)
    row_bytes = case.columns * formats.BITS[code] // 8
    return Weight(
        code,
        scale_format,
        codes=rng.integers(0, 256, (case.batch, case.rows, row_bytes), np.uint8),
        scale=np.frombuffer(rng.bytes(np.prod(groups) * scale_dtype.itemsize), scale_dtype).reshape(groups),
        zero=rng.integers(-128, 128, groups, np.int8) if zero else None,
        divisor=rng.uniform(0.1, 1e4, case.batch).astype(np.float32) if scale_format == "e4m3" else None,
    )
