"""The operation as one fused Pallas kernel for TPU: codes are read once, and the result is written once, transposed.

The transpose happens on bytes, a half or a quarter of the result's volume. It also turns the two codes of a byte into
two neighboring rows, so that expanding them moves data between sublanes, never between lanes.

A block is worked on in pieces so small that everything between a load and a store stays in registers, in loops that the
compiler must not reorder. Written as operations on whole blocks, the same arithmetic spills on every generation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels.grouped import formats, reference
from slicecast.kernels.grouped.formats import Code, ScaleFormat

LANES = 128
"""The minor dimension of every TPU register tile, so of every block here."""

SUBLANES = 8
"""Rows of a register tile of 32-bit numbers. Groups of a multiple of this size split off without moving data."""

PIECE_BYTES = 32
"""Rows of transposed bytes that are decoded at once: one register tile of bytes, at most eight of float32."""

TARGET_COLUMNS = 1024
"""Columns of a block where the group size leaves the choice."""

MAX_ELEMENTS = 512 * 1024
"""Elements of a block. All buffers then take at most 8 MiB: half of v4's VMEM, and half of what v5e grants a kernel by
default."""

INTERLEAVED_COLUMNS = 128
"""Columns that the compiler may work on at once, in two or four pieces. More would spill on v4."""

INTERLEAVED_TRANSPOSES = 4
"""Transposes of [LANES, LANES] that the compiler may start before the first has ended."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one step of the grid divides the operands. The last block of either axis may be ragged.

    Attributes:
      rows: Rows of the weight, which are columns of the result; a multiple of `LANES`.
      columns: Columns of the weight, which are rows of the result; their codes are a multiple of `LANES` bytes.
      groups: Scales of one row that a block needs.
    """

    rows: int
    columns: int
    groups: int


def choose_blocks(rows: int, columns: int, group_size: int, *, bits: int, sublanes: int) -> Blocks | str:
    """Returns the block sizes for a weight [rows, columns], or a sentence saying why the kernel does not apply.

    Args:
      rows: Output features.
      columns: Input features.
      group_size: Elements of a row that share a scale.
      bits: The width of a code.
      sublanes: Rows of a register tile in the narrowest of the dtypes that have a value for each group.
    """
    piece = PIECE_BYTES * 8 // bits
    tile = LANES * 8 // bits
    groups = columns // group_size
    if groups == 1:
        # A block lies within the group wherever it starts.
        block_columns = min(TARGET_COLUMNS, _round_up(columns, tile))
    elif group_size % piece and (piece % group_size or group_size % SUBLANES):
        return f"group size {group_size} is neither a multiple of {piece} nor {SUBLANES} times a power of two below it"
    elif groups <= sublanes:
        block_columns = _round_up(columns, tile)
    else:
        unit = math.lcm(tile, sublanes * group_size)
        block_columns = unit * max(1, min(TARGET_COLUMNS, columns) // unit)
        groups = block_columns // group_size
    if block_columns * LANES > MAX_ELEMENTS:
        return f"a block of whole groups of {group_size} needs {block_columns} columns, too many for VMEM"
    block_rows = min(MAX_ELEMENTS // block_columns // LANES * LANES, _round_up(rows, LANES))
    return Blocks(block_rows, block_columns, groups)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _stored_transposed(rows: int, columns: int, sublanes: int) -> bool:
    """Whether XLA stores an array [..., rows, columns] with its rows as the minor dimension.

    Unless told otherwise it takes the order that wastes less of the tiles [sublanes, LANES] that memory consists of.
    """
    transposed = _round_up(columns, sublanes) * _round_up(rows, LANES)
    return transposed < _round_up(rows, sublanes) * _round_up(columns, LANES)


def _sublanes(x: jax.Array) -> int:
    """Rows of a register tile of the dtype of `x`."""
    return SUBLANES * 4 // x.dtype.itemsize


def unsupported(codes: jax.Array, scale: jax.Array, code: Code, group_size: int, zero: jax.Array | None) -> str | None:
    """Returns a sentence saying why the kernel does not handle operands of these shapes, or None if it does."""
    blocks = _blocks(codes, scale, code, group_size, zero)
    return blocks if isinstance(blocks, str) else None


def _blocks(codes: jax.Array, scale: jax.Array, code: Code, group_size: int, zero: jax.Array | None) -> Blocks | str:
    _, rows, row_bytes = codes.shape
    bits = formats.BITS[code]
    sublanes = max(_sublanes(x) for x in (scale, zero) if x is not None)
    return choose_blocks(rows, row_bytes * 8 // bits, group_size, bits=bits, sublanes=sublanes)


def _decode_scales(scale: jax.Array, scale_format: ScaleFormat, significands_ref: jax.Ref | None) -> jax.Array:
    """Returns scales of any shape as float32; `significands_ref` is float32[1, 1, 16]."""
    if scale_format == "float":
        return scale.astype(jnp.float32)
    x = scale.astype(jnp.int32)
    if scale_format == "e8m0":
        return formats.decode_e8m0(x)
    assert significands_ref is not None, "`check` has seen them"
    return formats.decode_e4m3(x, [significands_ref[0, 0, i] for i in range(formats.SIGNIFICANDS)])


def _loop(steps: int, body: Callable[[jax.Array], None], *, interleave: int = 1) -> None:
    """Calls `body` for each step. The compiler may interleave `interleave` of them."""
    lax.fori_loop(0, steps, lambda i, _: body(i), None, unroll=min(interleave, steps))


def _slice(i: jax.Array, size: int) -> slice | pl.Slice:
    """The i-th slice of a size that is a multiple of the register tile."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def _kernel(
    inputs: dict[str, jax.Ref],
    out_ref: jax.Ref,
    scales: jax.Ref,
    zeros: jax.Ref,
    moved: jax.Ref,
    values: jax.Ref,
    *,
    code: Code,
    group_size: int,
    scale_format: ScaleFormat,
    codes_transposed: bool,
    out_transposed: bool,
) -> None:
    """Dequantizes one block, `LANES` rows of the weight at a time.

    Args:
      inputs: `codes`, uint8[1, rows, bytes], or [1, bytes, rows] if they are transposed; `scale`, as stored, and
        `zero`, int8[1, groups, rows]; `significands`, float32[1, 1, 16]. The last two may be missing.
      out_ref: bfloat16 or float32[1, columns, rows], or [1, rows, columns] if it is transposed.
      scales: float32[groups, LANES], the scales of the rows at hand.
      zeros: float32[groups, LANES], their zero points.
      moved: uint8[bytes, LANES], their codes.
      values: The dtype of the result[columns, LANES], their values.
      code: How an element is stored.
      group_size: Elements of a row that share a scale.
      scale_format: How a scale is stored.
      codes_transposed: Whether the block of codes is transposed.
      out_transposed: Whether the block of the result is transposed.
    """
    groups, rows = inputs["scale"].shape[1:]
    bits = formats.BITS[code]
    piece = PIECE_BYTES * 8 // bits
    piece_groups = max(1, piece // group_size)

    def dequantize_rows(i: jax.Array) -> None:
        lanes = _slice(i, LANES)
        codes_ref = inputs["codes"].at[0, :, lanes] if codes_transposed else moved
        values_ref = values if out_transposed else out_ref.at[0, :, lanes]

        def transpose_codes(i: jax.Array) -> None:
            tile = _slice(i, LANES)
            moved[tile] = inputs["codes"][0, lanes, tile].T

        def dequantize_piece(i: jax.Array) -> None:
            x = codes_ref[_slice(i, PIECE_BYTES)]
            if bits == 4:
                # [bytes, rows] to [2 * bytes, rows]: byte row j becomes row 2j (low nibble) and row 2j+1 (high nibble).
                x = pltpu.bitcast(x, jnp.uint4)
            # To int32, since not every generation converts narrow integers to float32 directly.
            y = formats.decode_codes(x.astype(jnp.int32), code).reshape(piece_groups, piece // piece_groups, LANES)
            first = i * piece_groups if group_size < piece else lax.div(i * piece, group_size)
            group = pl.ds(first, piece_groups)
            if "zero" in inputs:
                y -= zeros[group][:, None]
            y *= scales[group][:, None]
            values_ref[_slice(i, piece)] = y.reshape(piece, LANES).astype(out_ref.dtype)

        def transpose_values(i: jax.Array) -> None:
            tile = _slice(i, LANES)
            out_ref[0, lanes, tile] = values[tile].T

        for start in range(0, groups, SUBLANES):
            group = pl.ds(start, min(SUBLANES, groups - start))
            scales[group] = _decode_scales(inputs["scale"][0, group, lanes], scale_format, inputs.get("significands"))
            if "zero" in inputs:
                zeros[group] = inputs["zero"][0, group, lanes].astype(jnp.int32).astype(jnp.float32)
        if not codes_transposed:
            _loop(moved.shape[0] // LANES, transpose_codes, interleave=INTERLEAVED_TRANSPOSES)
        _loop(values.shape[0] // piece, dequantize_piece, interleave=INTERLEAVED_COLUMNS // piece)
        if out_transposed:
            _loop(values.shape[0] // LANES, transpose_values, interleave=INTERLEAVED_TRANSPOSES)

    _loop(rows // LANES, dequantize_rows)


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
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Computes what `reference.dequantize` defines.

    See `slicecast.kernels.grouped.dequantize` for the arguments.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation, or `unsupported` says why they do not fit the kernel.
    """
    reference.check(
        codes,
        scale,
        code=code,
        group_size=group_size,
        dtype=dtype,
        scale_format=scale_format,
        zero=zero,
        significands=significands,
    )
    blocks = _blocks(codes, scale, code, group_size, zero)
    if isinstance(blocks, str):
        raise ValueError(f"The Pallas TPU kernel does not apply: {blocks}.")
    batch, rows, row_bytes = codes.shape
    bits = formats.BITS[code]
    columns = row_bytes * 8 // bits
    block_bytes = blocks.columns * bits // 8
    # The kernel takes codes and gives results in the order that XLA stores them in, so that swapping axes here costs
    # nothing. Most scales are stored as the kernel wants them. XLA transposes the others: they are few.
    codes_transposed = _stored_transposed(rows, row_bytes, _sublanes(codes))
    out_transposed = _stored_transposed(columns, rows, SUBLANES)
    one_group = group_size == columns
    if one_group:
        group_size = blocks.columns  # Every piece of a block lies within the group, and so may what sticks out.

    def of_groups(b: int, n: int, k: int) -> tuple[int, int, int]:
        return (b, 0 if one_group else k, n)

    def by_rows(b: int, n: int, k: int) -> tuple[int, int, int]:
        return (b, n, k)

    def by_columns(b: int, n: int, k: int) -> tuple[int, int, int]:
        return (b, k, n)

    inputs = {"codes": codes.swapaxes(1, 2) if codes_transposed else codes, "scale": scale.swapaxes(1, 2)}
    specs = {
        "codes": pl.BlockSpec((1, block_bytes, blocks.rows), by_columns)
        if codes_transposed
        else pl.BlockSpec((1, blocks.rows, block_bytes), by_rows),
        "scale": pl.BlockSpec((1, blocks.groups, blocks.rows), of_groups),
    }
    if scale.dtype == jnp.float16:
        # Not every generation loads it.
        inputs["scale"] = inputs["scale"].astype(jnp.float32)
    if zero is not None:
        inputs["zero"] = zero.swapaxes(1, 2)
        specs["zero"] = specs["scale"]
    if significands is not None:
        inputs["significands"] = significands[:, None]
        specs["significands"] = pl.BlockSpec(
            (1, 1, formats.SIGNIFICANDS), lambda b, n, k: (b, 0, 0), memory_space=pltpu.SMEM
        )
    if out_transposed:
        out_shape, out_spec = (batch, rows, columns), pl.BlockSpec((1, blocks.rows, blocks.columns), by_rows)
    else:
        out_shape, out_spec = (batch, columns, rows), pl.BlockSpec((1, blocks.columns, blocks.rows), by_columns)
    groups = pltpu.VMEM((pl.cdiv(blocks.columns, group_size), LANES), jnp.float32)
    y: jax.Array = pl.pallas_call(
        functools.partial(
            _kernel,
            code=code,
            group_size=group_size,
            scale_format=scale_format,
            codes_transposed=codes_transposed,
            out_transposed=out_transposed,
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, dtype),
        grid=(batch, pl.cdiv(rows, blocks.rows), pl.cdiv(columns, blocks.columns)),
        in_specs=[specs],
        out_specs=out_spec,
        # Some are for some formats only. They are small, and a kernel's signature that depends on the format is not
        # worth what they take.
        scratch_shapes=[
            groups,
            groups,
            pltpu.VMEM((block_bytes, LANES), jnp.uint8),
            pltpu.VMEM((blocks.columns, LANES), jnp.dtype(dtype)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name="grouped_dequantize",
    )(inputs)
    return y.swapaxes(1, 2) if out_transposed else y
