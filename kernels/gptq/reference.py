"""The definition of the operation in plain JAX, and the fast path of every backend but the TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from slicecast.kernels import affine

WORD_BITS = 32
"""The width of a word."""

BITS = (2, 4, 8)
"""Widths of which a word holds a whole number of codes. The format's 3-bit codes straddle words."""


def check(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    bits: int,
    group_size: int,
    dtype: DTypeLike,
    group_index: jax.Array | None = None,
) -> None:
    """Raises `ValueError` unless the arguments fit the operation."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    if words.ndim != 3 or words.dtype != jnp.int32:
        raise ValueError(f"words must be int32[batch, in * bits / 32, out], not {words.dtype}{list(words.shape)}")
    if 0 in words.shape:
        raise ValueError(f"words must not be empty, but their shape is {list(words.shape)}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")
    batch, word_rows, columns = words.shape
    rows = word_rows * (WORD_BITS // bits)
    affine.check(scale, zero, (batch, -(-rows // group_size), columns), dtype)
    if group_index is not None and (group_index.dtype != jnp.int32 or group_index.shape != (batch, rows)):
        raise ValueError(f"group_index must be int32{[batch, rows]}, not {group_index.dtype}{list(group_index.shape)}")


def dequantize(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    bits: int,
    group_size: int,
    dtype: DTypeLike,
    group_index: jax.Array | None = None,
) -> jax.Array:
    """Computes `y[b, k, n] = (code(b, k, n) - zero[b, g, n]) * scale[b, g, n]`, rounded once to `dtype`.

    `g` is `k // group_size`, or `group_index[b, k]`. The product is computed in float32 whatever the scales' dtype.

    Args:
      words: int32[batch, in * bits / 32, out]. Bits [j * bits, (j + 1) * bits) of word row w are the code of element
        `k = w * (32 / bits) + j`.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out], the code that stands for zero.
      bits: The width of a code: 2, 4 or 8.
      group_size: Consecutive elements that share a scale and a zero. The last group may be shorter.
      dtype: bfloat16 or float32.
      group_index: int32[batch, in], the group of each element, within [0, groups); None for consecutive groups.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation.
    """
    check(words, scale, zero, bits=bits, group_size=group_size, dtype=dtype, group_index=group_index)
    batch, _, columns = words.shape
    shifts = bits * lax.broadcasted_iota(jnp.int32, (1, 1, WORD_BITS // bits, 1), 2)
    codes = lax.shift_right_logical(words[:, :, None, :], shifts) & (2**bits - 1)
    codes = codes.reshape(batch, -1, columns)
    return affine.reference(codes, scale, zero, group_size=group_size, dtype=dtype, group_index=group_index)
