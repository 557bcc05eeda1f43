"""The definition of the operation in plain JAX, and the fast path of every backend but the TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from slicecast.kernels import affine

PER_WORD = 8
"""Codes of 4 bits in an int32 word."""


def shifts(columns: jax.Array) -> jax.Array:
    """Where in a word the code of a column begins: `4 * (0, 4, 1, 5, 2, 6, 3, 7)[column % 8]`.

    Even columns fill the low half of a word, and odd columns the high half.

    Args:
      columns: int32, of any shape.
    """
    return 16 * (columns & 1) + 2 * (columns & 6)


def check(words: jax.Array, scale: jax.Array, zero: jax.Array, *, group_size: int, dtype: DTypeLike) -> None:
    """Raises `ValueError` unless the arguments fit the operation."""
    if words.ndim != 3 or words.dtype != jnp.int32:
        raise ValueError(f"words must be int32[batch, in, out/8], not {words.dtype}{list(words.shape)}")
    if scale.ndim != 3:
        raise ValueError(f"scale must be [batch, groups, out], not {list(scale.shape)}")
    if 0 in words.shape or 0 in scale.shape:
        raise ValueError(f"nothing must be empty, but the shapes are {list(words.shape)} and {list(scale.shape)}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")
    batch, rows, word_columns = words.shape
    columns = scale.shape[2]
    if columns > PER_WORD * word_columns:
        raise ValueError(f"{word_columns} words a row hold {PER_WORD * word_columns} columns, not {columns}")
    affine.check(scale, zero, (batch, -(-rows // group_size), columns), dtype)


def dequantize(words: jax.Array, scale: jax.Array, zero: jax.Array, *, group_size: int, dtype: DTypeLike) -> jax.Array:
    """Computes `y[b, k, n] = (code(b, k, n) - zero[b, g, n]) * scale[b, g, n]`, rounded once to `dtype`.

    `g` is `k // group_size`. The product is computed in float32 whatever the scales' dtype.

    Args:
      words: int32[batch, in, out/8]. The code of column `n` is the 4 bits from `shifts(n)` on of word column `n // 8`.
        There may be more words than `out` needs.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out], the code that stands for zero.
      group_size: Consecutive elements that share a scale and a zero. The last group may be shorter.
      dtype: bfloat16 or float32.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation.
    """
    check(words, scale, zero, group_size=group_size, dtype=dtype)
    batch, rows, _ = words.shape
    distance = shifts(lax.broadcasted_iota(jnp.int32, (1, 1, 1, PER_WORD), 3))
    codes = (lax.shift_right_logical(words[:, :, :, None], distance) & 15).reshape(batch, rows, -1)
    return affine.reference(codes[:, :, : scale.shape[2]], scale, zero, group_size=group_size, dtype=dtype)
