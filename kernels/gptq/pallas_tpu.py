"""The operation as one fused Pallas kernel for TPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels import affine
from slicecast.kernels.gptq import reference


def supported(rows: int, columns: int, group_size: int) -> str | None:
    """Returns None if the kernel handles a weight [rows, columns], else a sentence saying why it does not."""
    blocks = affine.choose_blocks(rows, columns, group_size)
    return blocks if isinstance(blocks, str) else None


def _unpack(words_ref: jax.Ref, row: jax.Array, rows: int, shared: int, *, bits: int) -> Iterator[affine.Piece]:
    """Yields the codes of a strip.

    A row of words is loaded into all rows of a tile at once, and each row of the tile is shifted by its own distance.
    So nothing moves between rows or columns, and every generation can do it.

    Args:
      words_ref: int32[1, rows of the block * bits / 32, columns].
      row: The first row of the strip in the block.
      rows: Rows of the strip.
      shared: Rows of it that share a scale; not of interest, since pieces of one tile need the fewest registers.
      bits: The width of a code.
    """
    del shared
    per_word = reference.WORD_BITS // bits
    first = lax.div(row, per_word)
    i = lax.broadcasted_iota(jnp.int32, (affine.SUBLANES, words_ref.shape[2]), 0)

    def tile(top: int) -> jax.Array:
        words = words_ref[0, pl.ds(first + top // per_word, 1)]
        if per_word < affine.SUBLANES:
            words = jnp.where(i < per_word, words, words_ref[0, pl.ds(first + top // per_word + 1, 1)])
        shifts = bits * ((i + top) & (per_word - 1))
        codes: jax.Array = lax.shift_right_logical(jnp.broadcast_to(words, i.shape), shifts) & (2**bits - 1)
        return codes

    for top in range(0, rows, affine.TILE_ROWS):
        yield top, 0, jnp.concatenate([tile(top), tile(top + affine.SUBLANES)])


def dequantize(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    bits: int,
    group_size: int,
    dtype: DTypeLike,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes what `reference.dequantize` defines without `group_index`.

    Args:
      words: int32[batch, in * bits / 32, out].
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out].
      bits: The width of a code: 2, 4 or 8.
      group_size: Consecutive elements that share a scale and a zero.
      dtype: bfloat16 or float32.
      interpret: For tests on a CPU: True for the generic interpreter, or the settings of the TPU interpreter.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: `supported` says why.
    """
    reference.check(words, scale, zero, bits=bits, group_size=group_size, dtype=dtype)
    _, word_rows, columns = words.shape
    rows = word_rows * reference.WORD_BITS // bits
    blocks = affine.choose_blocks(rows, columns, group_size)
    if isinstance(blocks, str):
        raise ValueError(f"The Pallas TPU kernel does not apply: {blocks}.")
    return affine.pallas_tpu(
        words,
        scale,
        zero,
        rows=rows,
        dtype=dtype,
        blocks=blocks,
        words_block=(blocks.rows * bits // reference.WORD_BITS, blocks.columns),
        unpack=functools.partial(_unpack, bits=bits),
        name="gptq_dequantize",
        interpret=interpret,
    )
