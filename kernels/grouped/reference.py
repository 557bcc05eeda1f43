"""The definition of the operation in plain JAX, and the fast path of every backend but the TPU."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from slicecast.kernels.grouped import formats
from slicecast.kernels.grouped.formats import Code, ScaleFormat

LINE_BYTES = 64
"""Bytes of a row moved per step of the blocked transpose: one cache line, so that no line is read twice."""

WORDS = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}
"""Unsigned word types by bytes, widest first: XLA:CPU transposes 4-byte words several times faster than bytes."""


def check(
    codes: jax.Array,
    scale: jax.Array,
    *,
    code: Code,
    group_size: int,
    dtype: DTypeLike,
    scale_format: ScaleFormat = "float",
    zero: jax.Array | None = None,
    significands: jax.Array | None = None,
) -> None:
    """Raises `ValueError` unless the arguments fit the operation."""
    if code not in get_args(Code):
        raise ValueError(f"code must be one of {get_args(Code)}, not {code!r}")
    if scale_format not in get_args(ScaleFormat):
        raise ValueError(f"scale_format must be one of {get_args(ScaleFormat)}, not {scale_format!r}")
    if codes.ndim != 3 or codes.dtype != jnp.uint8:
        raise ValueError(f"codes must be uint8[batch, out, in * bits / 8], not {codes.dtype}{list(codes.shape)}")
    if 0 in codes.shape:
        raise ValueError(f"codes must not be empty, but their shape is {list(codes.shape)}")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16 or float32, not {jnp.dtype(dtype)}")
    batch, rows, row_bytes = codes.shape
    columns = row_bytes * 8 // formats.BITS[code]
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide in = {columns}")
    groups = (batch, rows, columns // group_size)
    if scale_format == "float" and scale.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"scale must be bfloat16, float16 or float32, not {scale.dtype}")
    if scale_format != "float" and scale.dtype != jnp.uint8:
        raise ValueError(f"scale must be uint8 in the format {scale_format}, not {scale.dtype}")
    if scale.shape != groups:
        raise ValueError(f"scale must have the shape {list(groups)}, not {list(scale.shape)}")
    if zero is not None:
        if code not in formats.INTEGERS:
            raise ValueError(f"zero goes with {formats.INTEGERS}, not with {code!r}")
        if zero.dtype != jnp.int8 or zero.shape != groups:
            raise ValueError(f"zero must be int8{list(groups)}, not {zero.dtype}{list(zero.shape)}")
    if (significands is not None) != (scale_format == "e4m3"):
        raise ValueError(f"significands go with the scale format 'e4m3', and only with it; it is {scale_format!r}")
    table = (batch, formats.SIGNIFICANDS)
    if significands is not None and (significands.dtype != jnp.float32 or significands.shape != table):
        raise ValueError(
            f"significands must be float32{list(table)}, not {significands.dtype}{list(significands.shape)}"
        )


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


def _transposed_codes(x: jax.Array, bits: int) -> jax.Array:
    """Returns the codes of `bits` bits in uint8[batch, rows, bytes] as int32[batch, columns, rows]."""
    batch, rows, row_bytes = x.shape
    width = next(width for width in WORDS if row_bytes % width == 0)
    words = _transpose(x, width=width)
    # Little-endian: bits [i * bits, (i + 1) * bits) of a word are code i of those it holds.
    shifts = bits * lax.broadcasted_iota(words.dtype, (1, 1, 8 * width // bits, 1), 2)
    codes: jax.Array = (words[:, :, None, :] >> shifts) & (2**bits - 1)
    return codes.astype(jnp.int32).reshape(batch, row_bytes * 8 // bits, rows)


def _transposed_scales(scale: jax.Array, scale_format: ScaleFormat, significands: jax.Array | None) -> jax.Array:
    """Returns scales [batch, rows, groups] as float32[batch, groups, rows]."""
    match scale_format:
        case "float":
            return _transpose(scale).astype(jnp.float32)
        case "e8m0":
            return formats.decode_e8m0(_transposed_codes(scale, 8))
        case "e4m3":
            assert significands is not None, "`check` has seen them"
            replacements = [significands[:, i, None, None] for i in range(formats.SIGNIFICANDS)]
            return formats.decode_e4m3(_transposed_codes(scale, 8), replacements)


def dequantize(
    codes: jax.Array,
    scale: jax.Array,
    *,
    code: Code,
    group_size: int,
    dtype: DTypeLike,
    scale_format: ScaleFormat = "float",
    zero: jax.Array | None = None,
    significands: jax.Array | None = None,
) -> jax.Array:
    """Computes `y[b, k, n] = (value(codes[b, n, k]) - zero[b, n, g]) * scale[b, n, g]`, with `g = k // group_size`.

    Values and scales are decoded to float32 exactly. The product is rounded once to float32, and once to `dtype`.
    See `slicecast.kernels.grouped.dequantize` for the arguments.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation.
    """
    check(
        codes,
        scale,
        code=code,
        group_size=group_size,
        dtype=dtype,
        scale_format=scale_format,
        zero=zero,
        significands=significands,
    )
    batch, rows, _ = codes.shape
    values = formats.decode_codes(_transposed_codes(codes, formats.BITS[code]), code)
    values = values.reshape(batch, -1, group_size, rows)
    if zero is not None:
        values -= _transpose(zero).astype(jnp.float32)[:, :, None, :]
    values *= _transposed_scales(scale, scale_format, significands)[:, :, None, :]
    return values.astype(dtype).reshape(batch, -1, rows)
