"""The codec of every format that stores rows of codes and a scale for each group of a row's columns.

    W[r, c] = (value(code[r, c]) - zero[r, c // group]) * scale[r // rows_per_scale, c // group]

That covers most of what is published: FP8 in blocks, per tensor and per channel, MXFP8, INT8, compressed-tensors'
packed integers, MXFP4 and NVFP4. They differ in what a code means (`Code`), in how a scale is stored (`ScaleFormat`),
and in how many rows share one. The modules beside this one say which is which; here is what they have in common.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.codecs import bit_stream
from slicecast.convert.codecs.base import Kernel, Part
from slicecast.convert.errors import UnsupportedFormatError
from slicecast.kernels import grouped
from slicecast.kernels.grouped import Code, ScaleFormat
from slicecast.kernels.implementation import Implementation

# NVFP4's scale s becomes s * g with ModelOpt's `weight_scale_2`, and s / g with compressed-tensors'
# `weight_global_scale`.
GlobalScale = Literal["multiply", "divide"]

_FOUR_BITS: frozenset[Code] = frozenset(("int4_offset", "e2m1"))


@dataclass(frozen=True, slots=True)
class Grouped:
    """Codes with a scale for each group of columns. Stored tensors are `[..., out, in]`, with no or one leading axis.

    The parts are, in this order: the codes `[..., out, bytes]`, the scales `[..., scale rows, groups]`, and then, where
    the format has them, the zero points and the global scale.

    Attributes:
        description: What the plan calls it.
        code: What a code means to the kernel.
        out: The logical number of rows of each matrix.
        columns: The logical number of columns.
        group_size: How many columns share a scale. The last group may be smaller.
        scale_format: How scales are stored.
        rows_per_scale: How many rows share a scale.
        zero: How zero points are stored, if there are any: as bytes, or in a bit stream along the rows.
        global_scale: What a scale for the whole tensor does to the others, if there is one.
        packing: The bit stream of codes that are neither nibbles nor bytes; the host unpacks them.
        transposed: True if the logical tensor is `[..., in, out]`.
    """

    changes_values: ClassVar[bool] = True
    kernel: ClassVar[Kernel | None] = "grouped"
    row_unit: ClassVar[int] = 1

    description: str
    code: Code
    out: int
    columns: int
    group_size: int
    scale_format: ScaleFormat = "float"
    rows_per_scale: int = 1
    zero: bit_stream.Packing | Literal["bytes"] | None = None
    global_scale: GlobalScale | None = None
    packing: bit_stream.Packing | None = None
    transposed: bool = False

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """Codes, scales and zero points have rows; what replaces the global scale has none."""
        return (0, 0) + ((0,) if self.zero is not None else ()) + ((None,) if self.global_scale is not None else ())

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group_size)

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Repeats scales so that each row has its own, and unpacks what is not in whole nibbles or bytes.

        Raises:
            UnsupportedFormatError: If there is a global scale that no model has.
        """
        codes, scale, *rest = parts
        if self.packing is not None:
            codes = bit_stream.unpack(codes, 0, self.columns, self.packing).view(np.uint8)
        prepared = [codes, self._for_each_row(scale, start, stop)]
        if self.zero == "bytes":
            prepared.append(self._for_each_row(rest.pop(0), start, stop))
        elif self.zero is not None:
            prepared.append(bit_stream.unpack(rest.pop(0).T, start, stop, self.zero).T)
        if self.global_scale is not None:
            prepared.append(_significands(rest.pop(0), self.global_scale))
        return tuple(prepared)

    def _for_each_row(self, scale: np.ndarray, start: int, stop: int) -> np.ndarray:
        if self.rows_per_scale == 1:
            return scale
        if scale.ndim == 3:  # The rows that are cut are whole matrices here.
            return scale[:, np.arange(self.out) // self.rows_per_scale]
        return scale[np.arange(start, stop) // self.rows_per_scale - start // self.rows_per_scale]

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """Codes as the kernel takes them, and a scale for each group of each row."""
        matrix_rows = rows if len(parts[0].shape) == 2 else rows * self.out
        code_bytes = self.columns if self.packing is not None else parts[0].shape[-1] * parts[0].dtype.itemsize
        group_bytes = parts[1].dtype.itemsize + (1 if self.zero is not None else 0)
        table = _SIGNIFICANDS * np.dtype(np.float32).itemsize if self.global_scale is not None else 0
        return matrix_rows * (code_bytes + self.groups * group_bytes) + table

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """Arrays are `uint8[batch, ..., out, bytes]`, `scale[batch, ..., out, groups]` and what else the format has."""
        codes, scale, *rest = arrays
        zero = rest.pop(0) if self.zero is not None else None
        significands = rest.pop(0) if self.global_scale is not None else None
        leading = codes.shape[:-2]
        # Rows may end within a group or a word, but the kernel takes whole groups of whole bytes.
        unit = math.lcm(2, self.group_size) if self.code in _FOUR_BITS else self.group_size
        columns = -(-self.columns // unit) * unit
        codes = _padded(codes, columns // 2 if self.code in _FOUR_BITS else columns)
        scale = _padded(scale, columns // self.group_size)
        zero = None if zero is None else _padded(zero, columns // self.group_size)
        values = grouped.dequantize(
            codes.reshape(-1, *codes.shape[-2:]),
            scale.reshape(-1, *scale.shape[-2:]),
            code=self.code,
            group_size=self.group_size,
            dtype=dtype,
            scale_format=self.scale_format,
            zero=None if zero is None else zero.reshape(-1, *zero.shape[-2:]),
            significands=significands,
            implementation=implementation,
        )[:, : self.columns]
        values = values.reshape(*leading, *values.shape[-2:])
        return values if transposed != self.transposed else jnp.swapaxes(values, -1, -2)


_SIGNIFICANDS = 16

# Global scales within these bounds keep every product and quotient with them a normal float32, of which a power of two
# can be taken out. Beyond them no weights of a model lie.
_GLOBAL_SCALES = (2.0**-100, 2.0**100)


def _significands(global_scale: np.ndarray, how: GlobalScale) -> np.ndarray:
    """What each significand of an NVFP4 scale becomes with the global scale, `float32[16]`.

    A scale in E4M3 is `M * 2**e` with `M` below 16, so that its product or quotient with the global scale is that of
    `M`, rounded once, times a power of two. Chips need not divide, which they do not do exactly.

    Raises:
        UnsupportedFormatError: If the global scale is so large or so small that this does not hold.
    """
    values = np.arange(_SIGNIFICANDS, dtype=np.float32)
    factor = global_scale.reshape(()).astype(np.float32)
    least, most = _GLOBAL_SCALES
    if np.isfinite(factor) and factor != 0 and not least <= abs(factor) <= most:
        raise UnsupportedFormatError(
            f"has the global scale {factor!s}; expected one between {least:.2g} and {most:.2g}. Download the "
            "checkpoint again."
        )
    with np.errstate(all="ignore"):  # A global scale of zero or infinity gives what float32 arithmetic gives.
        return values * factor if how == "multiply" else values / factor


def _padded(x: jax.Array, columns: int) -> jax.Array:
    """The array with as many columns: cropped, or continued with zeros."""
    x = x[..., :columns]
    missing = columns - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
