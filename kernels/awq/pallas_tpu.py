"""The operation as one fused Pallas kernel for TPU."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels import affine
from slicecast.kernels.awq import reference

UNIT = reference.PER_WORD * affine.LANES
"""Columns that a register tile of words holds."""


def supported(rows: int, columns: int, group_size: int) -> str | None:
    """Returns None if the kernel handles a weight [rows, columns], else a sentence saying why it does not."""
    blocks = affine.choose_blocks(rows, columns, group_size, unit=UNIT)
    return blocks if isinstance(blocks, str) else None


def _unpack(words_ref: jax.Ref, row: jax.Array, rows: int, shared: int) -> Iterator[affine.Piece]:
    """Yields the codes of a strip.

    A permutation of lanes brings the word of each column into the column's lane, and each lane is shifted by its own
    distance. Every generation can do that. A reshape of words to codes needs more memory than most of them have.

    Args:
      words_ref: int32[1, rows of the block, columns / 8].
      row: The first row of the strip in the block.
      rows: Rows of the strip.
      shared: Rows of it that share a scale.
    """
    lane = lax.broadcasted_iota(jnp.int32, (shared, affine.LANES), 1)
    distance = reference.shifts(lane)
    for first in range(0, words_ref.shape[2], affine.LANES):
        for left in range(0, UNIT, affine.LANES):
            # The inner loop permutes all rows in the same way: to set a permutation up takes longer than to do it.
            source = (left + lane) >> 3
            for top in range(0, rows, shared):
                words = words_ref[0, pl.ds(row + top, shared), first : first + affine.LANES]
                spread = jnp.take_along_axis(words, source, axis=1, mode="promise_in_bounds")
                yield top, reference.PER_WORD * first + left, lax.shift_right_logical(spread, distance) & 15


def dequantize(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    group_size: int,
    dtype: DTypeLike,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes what `reference.dequantize` defines.

    Args:
      words: int32[batch, in, out/8]. There may be more words than `out` needs.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out].
      group_size: Consecutive elements that share a scale and a zero.
      dtype: bfloat16 or float32.
      interpret: For tests on a CPU: True for the generic interpreter, or the settings of the TPU interpreter.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: `supported` says why.
    """
    reference.check(words, scale, zero, group_size=group_size, dtype=dtype)
    rows = words.shape[1]
    blocks = affine.choose_blocks(rows, scale.shape[2], group_size, unit=UNIT)
    if isinstance(blocks, str):
        raise ValueError(f"The Pallas TPU kernel does not apply: {blocks}.")
    return affine.pallas_tpu(
        words,
        scale,
        zero,
        rows=rows,
        dtype=dtype,
        blocks=blocks,
        words_block=(blocks.rows, blocks.columns // reference.PER_WORD),
        unpack=_unpack,
        name="awq_dequantize",
        interpret=interpret,
    )
