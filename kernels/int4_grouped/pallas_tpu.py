"""The operation as one fused Pallas kernel for TPU: bytes are read once, and the result is written once, transposed.

The transpose happens on bytes, a quarter of the result's volume. It also turns the two nibbles of a byte into two
neighboring rows, so that expanding them moves data between sublanes, never between lanes.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels.int4_grouped import reference

LANES = 128
"""The minor dimension of every TPU register tile, so of every block here."""

SUBLANES = 8
"""Rows of a float32 register tile. Groups of a multiple of this size split off without moving data."""

MIN_COLUMNS = 2 * LANES
"""Columns of the smallest block: a byte holds two, and a block of bytes is a whole number of lane tiles wide."""

TARGET_COLUMNS = 1024
"""Columns of a block where the group size leaves the choice."""

MAX_ELEMENTS = 512 * 1024
"""Elements of a block. All buffers and temporaries then take less than half of the smallest VMEM: v4 has 16 MiB, and
v5e grants a kernel 16 MiB by default. Four times as many elements do not fit a v4."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one step of the grid divides the operands.

    Attributes:
      rows: Rows of `packed`, which are columns of the result; a multiple of `LANES`.
      columns: Columns of the dequantized weight, which are rows of the result; a multiple of `MIN_COLUMNS`.
      groups: Scales of one row that a block needs.
      steps_per_scale: Consecutive column blocks that share the same block of scales.
    """

    rows: int
    columns: int
    groups: int
    steps_per_scale: int


def choose_blocks(rows: int, columns: int, group_size: int) -> Blocks | str:
    """Returns the block sizes for a weight [rows, columns], or a sentence saying why the kernel does not apply.

    Every block covers whole groups, or lies within one group. The last block of either axis may be ragged.
    """
    if rows < LANES or columns < MIN_COLUMNS:
        return f"the weight [{rows}, {columns}] is smaller than one block [{LANES}, {MIN_COLUMNS}]"
    if group_size == columns:
        # One group per row: a block lies within it wherever it starts.
        block_columns = min(TARGET_COLUMNS, columns // MIN_COLUMNS * MIN_COLUMNS)
        groups, steps = 1, pl.cdiv(columns, block_columns)
    elif group_size % SUBLANES:
        return f"group size {group_size} is not a multiple of {SUBLANES}"
    elif group_size % MIN_COLUMNS == 0:
        # Large groups: the largest part of a group that is at most the target.
        parts = group_size // MIN_COLUMNS
        per_block = max(n for n in range(1, TARGET_COLUMNS // MIN_COLUMNS + 1) if parts % n == 0)
        block_columns, groups, steps = MIN_COLUMNS * per_block, 1, parts // per_block
    else:
        unit = math.lcm(MIN_COLUMNS, group_size)
        if unit > min(columns, MAX_ELEMENTS // LANES):
            return f"a block of whole groups of {group_size} needs {unit} columns, too many for [{rows}, {columns}]"
        block_columns = max(unit, min(TARGET_COLUMNS, columns) // unit * unit)
        groups, steps = block_columns // group_size, 1
    block_rows = min(MAX_ELEMENTS // block_columns, rows) // LANES * LANES
    return Blocks(block_rows, block_columns, groups, steps)


def supported(rows: int, columns: int, group_size: int) -> str | None:
    """Returns None if the kernel handles a weight [rows, columns], else a sentence saying why it does not."""
    blocks = choose_blocks(rows, columns, group_size)
    return blocks if isinstance(blocks, str) else None


def _kernel(packed_ref: jax.Ref, scale_ref: jax.Ref, out_ref: jax.Ref) -> None:
    """Dequantizes one block.

    Args:
      packed_ref: uint8[1, rows, columns/2].
      scale_ref: float32[1, groups, 1, rows].
      out_ref: bfloat16 or float32[1, columns, rows].
    """
    _, columns, rows = out_ref.shape
    groups = scale_ref.shape[1]
    # [columns/2, rows] bytes to [columns, rows] nibbles: byte row j becomes row 2j (low) and row 2j+1 (high).
    nibbles = pltpu.bitcast(packed_ref[0].T, jnp.uint4)
    # Through int32, since not every generation converts 4-bit integers to float32 directly.
    q = nibbles.astype(jnp.int32).astype(jnp.float32) - reference.ZERO_POINT
    y = q.reshape(groups, columns // groups, rows) * scale_ref[0]
    out_ref[0] = y.reshape(columns, rows).astype(out_ref.dtype)


def dequantize(
    packed: jax.Array,
    scale: jax.Array,
    *,
    group_size: int,
    dtype: DTypeLike,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes what `reference.dequantize` defines.

    Args:
      packed: uint8[batch, out, in/2].
      scale: bfloat16, float16 or float32[batch, out, in/group_size].
      group_size: Elements of a row that share a scale.
      dtype: bfloat16 or float32.
      interpret: For tests on a CPU: True for the generic interpreter, or the settings of the TPU interpreter.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: `supported` says why.
    """
    reference.check(packed, scale, group_size=group_size, dtype=dtype)
    batch, rows, half = packed.shape
    columns = 2 * half
    blocks = choose_blocks(rows, columns, group_size)
    if isinstance(blocks, str):
        raise ValueError(f"The Pallas TPU kernel does not apply: {blocks}.")
    # XLA transposes the scales: they are few, and blocks of [out, groups] would be narrower than a register tile. The
    # axis of size 1 puts each group's scales in a tile of their own, ready to be broadcast over the group's rows.
    scales = scale.astype(jnp.float32).swapaxes(1, 2)[:, :, None, :]
    y: jax.Array = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((batch, columns, rows), dtype),
        grid=(batch, pl.cdiv(rows, blocks.rows), pl.cdiv(columns, blocks.columns)),
        in_specs=[
            pl.BlockSpec((1, blocks.rows, blocks.columns // 2), lambda b, n, k: (b, n, k)),
            pl.BlockSpec(
                (1, blocks.groups, 1, blocks.rows), lambda b, n, k: (b, lax.div(k, blocks.steps_per_scale), 0, n)
            ),
        ],
        out_specs=pl.BlockSpec((1, blocks.columns, blocks.rows), lambda b, n, k: (b, k, n)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name="int4_grouped_dequantize",
    )(packed, scales)
    return y
