"""What codes and scales mean, for both implementations, in operations that XLA and Mosaic both compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Code = Literal["int4_offset", "int8_offset", "int8", "e2m1", "e4m3", "e5m2"]
"""How an element is stored.

* `int4_offset`, `int8_offset`: the signed integer plus 8, in 4 bits, and plus 128, in 8 bits;
* `int8`: two's complement;
* `e2m1`: the 4-bit float of the OCP Microscaling Formats (MX) Specification 1.0, without infinities or NaN;
* `e4m3`, `e5m2`: the 8-bit floats of the OCP 8-bit Floating Point Specification (OFP8) 1.0. `e4m3` has no infinities:
  it is `float8_e4m3fn`.
"""

ScaleFormat = Literal["float", "e8m0", "e4m3"]
"""How a scale is stored.

* `float`: as a number, bfloat16, float16 or float32;
* `e8m0`: the power of two of the MX specification, `2**(byte - 127)`, or NaN for the byte 255;
* `e4m3`: an 8-bit float that a factor for the whole tensor multiplies or divides (NVFP4).
"""

BITS: dict[Code, int] = {"int4_offset": 4, "int8_offset": 8, "int8": 8, "e2m1": 4, "e4m3": 8, "e5m2": 8}
"""The width of a code."""

INTEGERS: tuple[Code, ...] = ("int4_offset", "int8_offset", "int8")
"""The codes that a zero point can be subtracted from."""

_E2M1_DOUBLED = np.uint32(0xC8643210).astype(np.int32)
"""Nibble i is twice the number with the code i: 0, 1, 2, 3, 4, 6, 8 or 12."""

SIGNIFICANDS = 16
"""The significand of a number in E4M3 is an integer below 16: 3 stored bits and the hidden one."""


def decode_codes(codes: jax.Array, code: Code) -> jax.Array:
    """Returns the exact values of codes.

    Args:
      codes: int32, of any shape; each element is one code, without a sign.
      code: What it means.

    Returns:
      float32, of the same shape.
    """
    match code:
        case "int4_offset":
            return (codes - 8).astype(jnp.float32)
        case "int8_offset":
            return (codes - 128).astype(jnp.float32)
        case "int8":
            return ((codes ^ 128) - 128).astype(jnp.float32)
        case "e2m1":
            # A table in the nibbles of a word: the doubles of the eight magnitudes, which are integers.
            doubled = lax.shift_right_logical(jnp.full(codes.shape, _E2M1_DOUBLED, jnp.int32), (codes & 7) * 4) & 15
            return _with_sign(0.5 * doubled.astype(jnp.float32), codes >> 3)
        case "e4m3":
            return jnp.where(codes & 0x7F == 0x7F, jnp.nan, _minifloat(codes, exponent_bits=4, mantissa_bits=3))
        case "e5m2":
            # Its largest exponent is float32's: infinity and NaN.
            special = lax.bitcast_convert_type(codes << 24 | 0x7F800000 | (codes & 3) << 21, jnp.float32)
            return jnp.where(codes & 0x7C == 0x7C, special, _minifloat(codes, exponent_bits=5, mantissa_bits=2))


def _minifloat(codes: jax.Array, *, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    """Returns what codes of a sign, an exponent and a mantissa are in float32, infinities and NaN aside.

    With float32's exponent bias, a code's bits are a float32 `f` that has the code's value unless its exponent is
    zero. Then `f` has a hidden bit too many, and is off by a factor of two: with the smallest normal number `s`, `f` is
    `s / 2 * (1 + m)` for `s * m`, which is `2 * f - s`. For all other codes that is at least `f`.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    magnitude = codes & (2 ** (exponent_bits + mantissa_bits) - 1)
    f = lax.bitcast_convert_type((magnitude << (23 - mantissa_bits)) + ((127 - bias) << 23), jnp.float32)
    value = jnp.minimum(f, 2 * f - 2.0 ** (1 - bias))
    return _with_sign(value, codes >> (exponent_bits + mantissa_bits))


def _with_sign(magnitude: jax.Array, sign: jax.Array) -> jax.Array:
    """Returns a float32 magnitude with the sign bit `sign`, so that zeros keep theirs."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.int32) | sign << 31, jnp.float32)


def decode_e8m0(scale: jax.Array) -> jax.Array:
    """Returns `2**(E - 127)`, or NaN for 255.

    Args:
      scale: int32, of any shape; bytes, without a sign.

    Returns:
      float32, of the same shape. The byte 0 is a subnormal number.
    """
    bits = jnp.where(scale == 0, 0x00400000, jnp.where(scale == 255, 0x7FC00000, scale << 23))
    return lax.bitcast_convert_type(bits, jnp.float32)


def decode_e4m3(scale: jax.Array, significands: Sequence[jax.Array]) -> jax.Array:
    """Returns scales in E4M3 of which each significand has been replaced by its product or quotient with a factor.

    Multiplying by a power of two is exact. So the product or quotient of a scale with the factor, rounded once, is the
    one of its significand, times that power.

    Args:
      scale: int32, of any shape; bytes, without a sign.
      significands: What replaces the significands 0 to 15; float32 scalars, or arrays that broadcast to the shape.

    Returns:
      float32, of the same shape.
    """
    exponent = scale >> 3 & 15
    # The three stored bits, and the hidden bit unless the exponent is zero.
    index = (scale & 7) + jnp.where(exponent > 0, 8, 0)
    # A look-up by comparison: not every TPU can index a table with vectors, and scales are few.
    significand = jnp.zeros(scale.shape, jnp.float32)
    for i, replacement in enumerate(significands):
        significand = jnp.where(index == i, replacement, significand)
    power = lax.bitcast_convert_type((jnp.maximum(exponent, 1) - 10 + 127) << 23, jnp.float32)
    magnitude = jnp.where(scale & 0x7F == 0x7F, jnp.nan, significand * power)
    return jnp.where(scale > 127, -magnitude, magnitude)
