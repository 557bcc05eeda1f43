"""What GPTQ and AWQ share: codes in 32-bit words, with a scale and a zero for each group of rows of each column.

The two differ only in where in which word a code lies. Both store weights as `[in, out]`, the order in which MaxText
keeps them, so that nothing is transposed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
"""The minor dimension of every TPU register tile."""

SUBLANES = 8
"""Rows of a register tile of 32-bit numbers."""

TILE_ROWS = 16
"""Rows of a register tile of bfloat16: what is stored at once without masks. Groups have a multiple of it."""

STRIP_ROWS = 128
"""Rows that a kernel computes in straight-line code: many enough to hide latencies, few enough not to spill. Blocks
consist of whole strips, and at any width, a strip's words are whole register tiles."""

TARGET_ROWS = 1024
"""Rows of a block where the group size leaves the choice."""

MAX_ELEMENTS = 512 * 1024
"""Elements of a block. All buffers then take at most 6 MiB, where the smallest VMEM, v4's, has 16 MiB, and v5e grants
a kernel 16 MiB by default."""


def check(scale: jax.Array, zero: jax.Array, expected: tuple[int, int, int], dtype: DTypeLike) -> None:
    """Raises `ValueError` unless scales and zeros have the shape `expected`, [batch, groups, out], and dtypes fit."""
    if scale.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"scale must be bfloat16, float16 or float32, not {scale.dtype}")
    if zero.dtype != jnp.uint8:
        raise ValueError(f"zero must be uint8, not {zero.dtype}")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16 or float32, not {jnp.dtype(dtype)}")
    for name, array in (("scale", scale), ("zero", zero)):
        if array.shape != expected:
            raise ValueError(f"{name} must have the shape {list(expected)}, not {list(array.shape)}")


def reference(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    group_size: int,
    dtype: DTypeLike,
    group_index: jax.Array | None = None,
) -> jax.Array:
    """Computes `(codes[b, k, n] - zero[b, g, n]) * scale[b, g, n]` in float32, rounded once to `dtype`, in plain JAX.

    Args:
      codes: int32[batch, in, out].
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out].
      group_size: Rows that share a scale and a zero: `g = k // group_size`. The last group may be shorter.
      dtype: bfloat16 or float32.
      group_index: int32[batch, in], the group `g` of each row instead, within [0, groups).

    Returns:
      dtype[batch, in, out].
    """

    def of_rows(x: jax.Array) -> jax.Array:
        """[batch, groups, out] to [batch, in, out]."""
        if group_index is not None:
            y: jax.Array = jax.vmap(lambda values, index: values.at[index].get(mode="promise_in_bounds"))(
                x, group_index
            )
            return y
        return jnp.repeat(x, group_size, axis=1)[:, : codes.shape[1]]

    difference = codes - of_rows(zero).astype(jnp.int32)
    y: jax.Array = (difference.astype(jnp.float32) * of_rows(scale).astype(jnp.float32)).astype(dtype)
    return y


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one step of the grid divides the operands.

    Attributes:
      rows: Rows of the result; a multiple of `STRIP_ROWS`.
      columns: Columns of the result; a multiple of `LANES`.
      strip: Rows computed at once.
      scales: Rows of the block of scales; a multiple of `SUBLANES`.
      steps: Consecutive blocks of rows that share a block of scales.
      group_size: Rows that share a scale. If all do, all rows of all blocks.
    """

    rows: int
    columns: int
    strip: int
    scales: int
    steps: int
    group_size: int


def choose_blocks(rows: int, columns: int, group_size: int, *, unit: int = LANES) -> Blocks | str:
    """Returns the block sizes for a weight [rows, columns], or a sentence saying why the kernel does not apply.

    Every block and every strip covers whole groups, or lies within one group. Blocks may reach beyond the weight, and
    the last group may be shorter than the others.

    Args:
      rows: Input features.
      columns: Output features.
      group_size: Rows that share a scale.
      unit: Columns of which a block has a multiple.
    """
    most_rows = MAX_ELEMENTS // unit
    target = min(TARGET_ROWS, most_rows, pl.cdiv(rows, STRIP_ROWS) * STRIP_ROWS)
    if group_size >= rows:
        # There is one group, and a block lies within it wherever it starts.
        block_rows = target
        group_size = pl.cdiv(rows, block_rows) * block_rows
    elif group_size % TILE_ROWS:
        return f"group size {group_size} is not a multiple of {TILE_ROWS}"
    elif group_size > target and group_size % STRIP_ROWS == 0:
        # Large groups: the largest part of a group that is at most the target.
        strips = group_size // STRIP_ROWS
        block_rows = STRIP_ROWS * max(n for n in range(1, target // STRIP_ROWS + 1) if strips % n == 0)
    else:
        whole_groups = math.lcm(STRIP_ROWS, group_size)
        if whole_groups > most_rows:
            return f"a block of whole groups of {group_size} needs {whole_groups} rows, and has at most {most_rows}"
        block_rows = max(whole_groups, target // whole_groups * whole_groups)
    scales = math.lcm(SUBLANES, max(1, block_rows // group_size))
    return Blocks(
        rows=block_rows,
        columns=min(MAX_ELEMENTS // block_rows // unit, pl.cdiv(columns, unit)) * unit,
        strip=STRIP_ROWS if STRIP_ROWS % group_size == 0 else math.gcd(STRIP_ROWS, group_size),
        scales=scales,
        steps=scales * group_size // block_rows,
        group_size=group_size,
    )


Piece = tuple[int, int, jax.Array]
"""Codes of a part of a strip, int32[rows, columns], and the row and the column of the strip where they begin."""

Unpack = Callable[[jax.Ref, jax.Array, int, int], Iterable[Piece]]
"""Takes a block of words, the first row of a strip in it, the rows of the strip, and the rows that share a scale. Gives
the strip in pieces of `TILE_ROWS` rows or a multiple, each within rows that share a scale."""


def _kernel(
    words_ref: jax.Ref,
    scale_ref: jax.Ref,
    zero_ref: jax.Ref,
    out_ref: jax.Ref,
    zeros_ref: jax.Ref,
    *,
    blocks: Blocks,
    unpack: Unpack,
) -> None:
    """Dequantizes one block.

    Args:
      words_ref: int32, as `unpack` expects it.
      scale_ref: float32[1, blocks.scales, blocks.columns].
      zero_ref: uint8[1, blocks.scales, blocks.columns].
      out_ref: bfloat16 or float32[1, blocks.rows, blocks.columns].
      zeros_ref: float32[blocks.scales, blocks.columns], where zeros get a form of which single rows can be loaded.
      blocks: What `choose_blocks` returned.
      unpack: Where the codes are.
    """
    zeros_ref[...] = zero_ref[0].astype(jnp.float32)
    first_row = pl.program_id(2) * blocks.rows
    # Rows of a strip that share a scale.
    shared = min(blocks.group_size, blocks.strip)

    def dequantize_strip(i: jax.Array, _: None) -> None:
        row = pl.multiple_of(i * blocks.strip, blocks.strip)
        group = lax.rem(lax.div(first_row + row, blocks.group_size), blocks.scales)
        groups = [pl.ds(group + j, 1) for j in range(blocks.strip // shared)]
        scales = [scale_ref[0, j] for j in groups]
        zeros = [zeros_ref[j] for j in groups]
        for top, left, codes in unpack(words_ref, row, blocks.strip, shared):
            height, width = codes.shape
            columns = slice(left, left + width)
            j = top // shared
            y = (codes.astype(jnp.float32) - zeros[j][:, columns]) * scales[j][:, columns]
            out_ref[0, pl.ds(row + top, height), columns] = y.astype(out_ref.dtype)

    lax.fori_loop(0, blocks.rows // blocks.strip, dequantize_strip, None)


def pallas_tpu(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    rows: int,
    dtype: DTypeLike,
    blocks: Blocks,
    words_block: tuple[int, int],
    unpack: Unpack,
    name: str,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Computes what `reference` defines as one fused kernel: words are read once, and the result is written once.

    Args:
      words: int32[batch, ...], of two more axes.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out].
      rows: Rows of the result, `in`.
      dtype: bfloat16 or float32.
      blocks: What `choose_blocks` returned for this weight.
      words_block: The shape of the words of a block.
      unpack: Where the codes are.
      name: The kernel's name in profiles.
      interpret: For tests on a CPU: True for the generic interpreter, or the settings of the TPU interpreter.

    Returns:
      dtype[batch, in, out].
    """
    batch, _, columns = scale.shape
    result = jax.ShapeDtypeStruct((batch, rows, columns), dtype)
    # Steps that share scales follow each other, so that the scales stay where they are.
    scales_block = pl.BlockSpec((1, blocks.scales, blocks.columns), lambda b, n, k: (b, lax.div(k, blocks.steps), n))
    if not interpret:
        # Else XLA may copy all words to VMEM before the kernel starts, if they fit.
        words = pltpu.with_memory_space_constraint(words, pltpu.HBM)
    # XLA converts the scales, which are few: not every generation can load float16 in a kernel.
    operands = (words, scale.astype(jnp.float32), zero)
    y: jax.Array = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, unpack=unpack),
        out_shape=result,
        grid=(batch, pl.cdiv(columns, blocks.columns), pl.cdiv(rows, blocks.rows)),
        in_specs=[pl.BlockSpec((1, *words_block), lambda b, n, k: (b, k, n)), scales_block, scales_block],
        out_specs=pl.BlockSpec((1, blocks.rows, blocks.columns), lambda b, n, k: (b, k, n)),
        scratch_shapes=[pltpu.VMEM((blocks.scales, blocks.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * result.size,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, result)),
        ),
        interpret=interpret,
        name=name,
    )(*operands)
    return y


def same_bits(function: Callable[..., jax.Array], operands: Sequence[np.ndarray], device: jax.Device) -> bool:
    """Whether two implementations of an operation give the same bits on a device.

    Args:
      function: Takes the operands and, by name, `implementation`; gives bfloat16.
      operands: On the host.
      device: Where both are run.
    """
    placed = jax.device_put(tuple(operands), device)
    xla, pallas = (
        np.asarray(jax.jit(functools.partial(function, implementation=name))(*placed)).view(np.uint16)
        for name in ("xla", "pallas_tpu")
    )
    return bool(np.array_equal(xla, pallas))
