"""AWQ in its `gemm` layout: 4-bit integers packed along the outputs, as AutoAWQ writes them.

For a logical weight `[out, in]` called `X.weight`:

* `X.qweight` I32 `[in, out / 8]`: a word holds eight outputs, output `i` of them at the bits `4 * SHIFTS[i]`.
* `X.qzeros` I32 `[groups, out / 8]`: zero points, in the same order.
* `X.scales` F16 `[groups, out]`.

`W[n, k] = (code(k, n) - zero[k // group_size, n]) * scale[k // group_size, n]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs import gptq
from slicecast.convert.codecs.base import FLOAT_DTYPES, Kernel, Part, StoredTensor, group_name
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.codecs.scales import check_shape
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels import awq
from slicecast.kernels.implementation import Implementation

# Where in a word each of its eight outputs lies, in units of four bits.
SHIFTS = (0, 4, 1, 5, 2, 6, 3, 7)
_PER_WORD = len(SHIFTS)


@dataclass(frozen=True, slots=True)
class Awq:
    """4-bit integers packed along the outputs. Parts: words, zero points, scales.

    Attributes:
        columns: The logical number of columns, the inputs.
        group_size: How many inputs share a scale.
    """

    changes_values: ClassVar[bool] = True
    kernel: ClassVar[Kernel | None] = "awq"
    # Rows of the logical tensor are the last axis of everything.
    row_axes: ClassVar[tuple[int | None, ...]] = (1, 1, 1)
    row_unit: ClassVar[int] = _PER_WORD

    columns: int
    group_size: int

    @property
    def description(self) -> str:
        """The format and its group size."""
        return f"awq int4, {group_name(self.group_size, self.columns)}"

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Unpacks the zero points. Rows that do not begin with a word are packed anew, and the last word filled up."""
        words, packed_zero, scale = parts
        skipped = start % _PER_WORD
        count = stop - start
        if skipped:
            codes = _unpack(words)[:, skipped : skipped + count]
            words = _pack(np.pad(codes, ((0, 0), (0, -count % _PER_WORD))))
        return words, _unpack(packed_zero)[:, skipped : skipped + count], scale

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """Words, unpacked zero points and scales."""
        words, _, scale = parts
        of_row = scale.shape[0] * (1 + scale.dtype.itemsize)
        return -(-rows // _PER_WORD) * self.columns * words.dtype.itemsize + rows * of_row

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """Arrays are `int32[batch, in, words]`, `uint8[batch, groups, rows]` and `scale[batch, groups, rows]`."""
        words, zero, scale = arrays
        x = awq.dequantize(words, scale, zero, group_size=self.group_size, dtype=dtype, implementation=implementation)
        return x if transposed else jnp.swapaxes(x, 1, 2)


def stored(
    base: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig
) -> StoredTensor:
    """The logical tensor that `X.qweight` and its partners are, `base` being `X`.

    Raises:
        MissingPartnerError: If the scales or zero points are missing.
        ShapeError: If shapes disagree with each other or with `config.json`.
    """
    words = tensors[f"{base}.qweight"]
    scale, zero = gptq.partners(base, words, tensors)
    out, columns = gptq.matrix(words, shape)
    group_size = gptq.group_size_of(scale, columns, quantization)
    groups = -(-columns // group_size)
    why = f"'{base}.weight' is {list(shape)} by config.json"
    check_shape(words, ("I32",), (columns, -(-out // _PER_WORD)), why)
    check_shape(zero, ("I32",), (groups, -(-out // _PER_WORD)), why)
    check_shape(scale, tuple(FLOAT_DTYPES), (groups, out), why)
    in_words = Fraction(1, _PER_WORD)
    parts = (
        Part(words, np.dtype(np.int32), words.shape, 1, in_words),
        Part(zero, np.dtype(np.int32), zero.shape, 1, in_words),
        Part(scale, FLOAT_DTYPES[scale.dtype], scale.shape, 1),
    )
    return StoredTensor(f"{base}.weight", shape, Awq(columns, group_size), parts)


def _unpack(words: np.ndarray) -> np.ndarray:
    """The codes of words `[a, b]`, in order: `uint8[a, 8 * b]`."""
    shifts = 4 * np.array(SHIFTS, np.uint32)
    codes = (words.view(np.uint32)[:, :, np.newaxis] >> shifts) & np.uint32(15)
    return codes.astype(np.uint8).reshape(len(words), -1)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Undoes `_unpack`."""
    shifts = 4 * np.array(SHIFTS, np.uint32)
    nibbles = codes.reshape(len(codes), -1, _PER_WORD).astype(np.uint32) << shifts
    words: np.ndarray = np.bitwise_or.reduce(nibbles, axis=2)
    return words.view(np.int32)
