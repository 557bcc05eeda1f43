"""The definition of the operation in plain JAX, and the fast path of every backend but the TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

ZERO_POINT = 8
"""A stored nibble is the signed value plus 8: the format is symmetric and 4 bits wide."""

LINE_BYTES = 64
"""Bytes of a row moved per step of the blocked transpose: one cache line, so that no line is read twice."""

WORDS = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}
"""Unsigned word types by bytes, widest first: XLA:CPU transposes 4-byte words several times faster than bytes."""


def check(packed: jax.Array, scale: jax.Array, *, group_size: int, dtype: DTypeLike) -> None:
    """Raises `ValueError` unless the arguments fit the operation."""
    if packed.ndim != 3 or packed.dtype != jnp.uint8:
        raise ValueError(f"packed must be uint8[batch, out, in/2], not {packed.dtype}{list(packed.shape)}")
    if scale.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"scale must be bfloat16, float16 or float32, not {scale.dtype}")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16 or float32, not {jnp.dtype(dtype)}")
    if 0 in packed.shape:
        raise ValueError(f"packed must not be empty, but its shape is {list(packed.shape)}")
    batch, rows, half = packed.shape
    if group_size < 1 or (2 * half) % group_size:
        raise ValueError(f"group_size {group_size} does not divide in = {2 * half}")
    expected = (batch, rows, 2 * half // group_size)
    if scale.shape != expected:
        raise ValueError(f"scale must have the shape {list(expected)}, not {list(scale.shape)}")


def _transpose(x: jax.Array, *, width: int = 1) -> jax.Array:
    """Swaps the last two axes of `x` into a buffer of its own.

    The loop is what makes this fast on a CPU. XLA would fuse a plain transpose into the arithmetic that follows, and
    the arithmetic would then read its input at a stride, once per output row. A loop is not fused into what follows.

    Args:
      x: [batch, rows, columns].
      width: Bytes to join into one little-endian word while they move; more than 1 only if `x` is uint8.

    Returns:
      [batch, columns, rows], or the unsigned words of `width` bytes [batch, columns/width, rows].
    """
    batch, rows, columns = x.shape
    step = min(columns, LINE_BYTES // x.dtype.itemsize)

    def move(i: jax.Array, moved: jax.Array) -> jax.Array:
        # The last step may be ragged: it starts early enough to be whole, and writes some rows twice.
        start = jnp.minimum(i * step, columns - step)
        block = lax.dynamic_slice(x, (0, 0, start), (batch, rows, step))
        if width > 1:
            block = lax.bitcast_convert_type(block.reshape(batch, rows, step // width, width), WORDS[width])
        return lax.dynamic_update_slice(moved, block.swapaxes(1, 2), (0, start // width, 0))

    dtype = x.dtype if width == 1 else WORDS[width]
    y: jax.Array = lax.fori_loop(0, -(-columns // step), move, jnp.zeros((batch, columns // width, rows), dtype))
    return y


def dequantize(packed: jax.Array, scale: jax.Array, *, group_size: int, dtype: DTypeLike) -> jax.Array:
    """Computes `y[b, k, n] = (nibble(b, n, k) - 8) * scale[b, n, k // group_size]`, rounded once to `dtype`.

    The product is computed in float32 whatever the dtype of the scales.

    Args:
      packed: uint8[batch, out, in/2]. Byte j of a row holds element 2j (low nibble) and 2j+1 (high nibble).
      scale: bfloat16, float16 or float32[batch, out, in/group_size].
      group_size: Elements of a row that share a scale. It divides `in`; `in` itself is the channel strategy.
      dtype: bfloat16 or float32.

    Returns:
      dtype[batch, in, out].
    """
    check(packed, scale, group_size=group_size, dtype=dtype)
    batch, rows, half = packed.shape
    width = next(width for width in WORDS if half % width == 0)
    words = _transpose(packed, width=width)
    scales = _transpose(scale).astype(jnp.float32)
    # Little-endian: nibble i of a word is element i of the 2 * width elements it holds.
    shifts = 4 * lax.broadcasted_iota(words.dtype, (1, 1, 2 * width, 1), 2)
    nibbles = (words[:, :, None, :] >> shifts) & 15
    q = nibbles.astype(jnp.int32).astype(jnp.float32) - ZERO_POINT
    y = q.reshape(batch, -1, group_size, rows) * scales[:, :, None, :]
    return y.astype(dtype).reshape(batch, 2 * half, rows)
