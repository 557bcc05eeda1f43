"""GPTQ: integers packed along the inputs, as AutoGPTQ, GPTQModel and AutoRound write them.

For a logical weight `[out, in]` called `X.weight`, with words of `32 / bits` codes, the first in the lowest bits:

* `X.qweight` I32 `[in * bits / 32, out]`: word `w` of a column holds the inputs from `w * 32 / bits` on.
* `X.scales` F16, BF16 or F32 `[groups, out]`.
* `X.qzeros` I32 `[groups, out * bits / 32]`: packed along the outputs. Version 1 of the format stores the zero point
  less one, modulo `2**bits`; version 2 stores it as it is.
* `X.g_idx` I32 `[in]`, often: the group of each input, which is not `input // group_size` where the writer ordered the
  inputs by activation (`desc_act`).

`W[n, k] = (code(k, n) - zero[group(k), n]) * scale[group(k), n]`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs import bit_stream
from slicecast.convert.codecs.base import FLOAT_DTYPES, Kernel, Part, StoredTensor, group_name
from slicecast.convert.codecs.quantization_config import ONE_GROUP, QuantizationConfig
from slicecast.convert.codecs.scales import check_shape, partner
from slicecast.convert.errors import MissingPartnerError, ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels import gptq
from slicecast.kernels.implementation import Implementation

_WORD_BITS = 32

# Widths that divide a word. Of the others only 3 bits was ever written, by releases that nobody loads any more.
_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers packed along the inputs. Parts: words, zero points, scales and, if stored, the group of each input.

    Attributes:
        bits: The width of a code: 2, 4 or 8.
        columns: The logical number of columns, the inputs.
        group_size: How many inputs share a scale where they are not ordered otherwise.
        stored_less_one: Whether zero points are stored less one: version 1.
    """

    changes_values: ClassVar[bool] = True
    kernel: ClassVar[Kernel | None] = "gptq"
    # Rows of the logical tensor are the last axis of everything but the groups of the inputs.
    row_axes: ClassVar[tuple[int | None, ...]] = (1, 1, 1, None)
    row_unit: ClassVar[int] = 1

    bits: int
    columns: int
    group_size: int
    stored_less_one: bool

    @property
    def description(self) -> str:
        """The format, its width and its group size."""
        group = group_name(self.group_size, self.columns)
        return f"gptq int{self.bits}, {group}, version {1 if self.stored_less_one else 2}"

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return -(-self.columns // self.group_size)

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Unpacks the zero points, and looks whether the inputs are in order.

        Raises:
            ShapeError: If an input belongs to a group that does not exist.
        """
        words, packed_zero, scale, *rest = parts
        zero = bit_stream.unpack(packed_zero, start, stop, bit_stream.Packing(self.bits)).view(np.uint8)
        if self.stored_less_one:
            zero = (zero + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        in_order = np.arange(self.columns, dtype=np.int32) // self.group_size
        group_index = rest[0] if rest else in_order
        if group_index.min() < 0 or group_index.max() >= self.groups:
            raise ShapeError(
                f"has a partner '.g_idx' that names the groups {group_index.min()} to {group_index.max()}, but there "
                f"are {self.groups} groups, from 0 on. Download the checkpoint again."
            )
        if np.array_equal(group_index, in_order):
            return words, zero, scale
        return words, zero, scale, group_index

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """Words, unpacked zero points and scales."""
        words, _, scale = parts[:3]
        of_row = words.shape[0] * words.dtype.itemsize + self.groups * (1 + scale.dtype.itemsize)
        order = parts[3].tensor.nbytes if len(parts) > 3 else 0
        return rows * of_row + order

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """Arrays are `int32[batch, words, rows]`, `uint8[batch, groups, rows]`, `scale[batch, groups, rows]`.

        Where inputs are not in order, there is a fourth: `int32[batch, columns]`.
        """
        words, zero, scale, *rest = arrays
        x = gptq.dequantize(
            words,
            scale,
            zero,
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype,
            group_index=rest[0] if rest else None,
            implementation="xla" if rest else implementation,
        )
        return x if transposed else jnp.swapaxes(x, 1, 2)


def stored(
    base: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig
) -> StoredTensor:
    """The logical tensor that `X.qweight` and its partners are, `base` being `X`.

    Raises:
        MissingPartnerError: If the scales or zero points are missing.
        ShapeError: If shapes disagree with each other or with `config.json`.
        UnsupportedFormatError: If the width is not supported.
    """
    words = tensors[f"{base}.qweight"]
    scale, zero = partners(base, words, tensors)
    out, columns = matrix(words, shape)
    group_size = group_size_of(scale, columns, quantization)
    groups = -(-columns // group_size)
    why = f"'{base}.weight' is {list(shape)} by config.json"
    bits = next((bits for bits in _BITS if words.shape == (columns * bits / _WORD_BITS, out)), None)
    if bits is None or (quantization.bits and bits not in quantization.bits):
        announced = " or ".join(map(str, sorted(quantization.bits))) or "?"
        raise UnsupportedFormatError(
            f"{words.file}: tensor '{words.name}' is {words.dtype}{list(words.shape)}, and the quantization_config "
            f"says {announced} bits; a weight of {list(shape)} (from config.json) is I32[in * bits / 32, out] with "
            f"{', '.join(map(str, _BITS))} bits."
        )
    check_shape(words, ("I32",), (columns * bits // _WORD_BITS, out), why)
    check_shape(scale, tuple(FLOAT_DTYPES), (groups, out), why)
    check_shape(zero, ("I32",), (groups, -(-out * bits // _WORD_BITS)), why)
    parts = [
        Part(words, np.dtype(np.int32), words.shape, 1),
        Part(zero, np.dtype(np.int32), zero.shape, 1, Fraction(bits, _WORD_BITS)),
        Part(scale, FLOAT_DTYPES[scale.dtype], scale.shape, 1),
    ]
    order = tensors.get(f"{base}.g_idx")
    if order is None and quantization.reordered:
        raise MissingPartnerError(
            f"{words.file}: tensor '{words.name}' has its inputs ordered by activation (desc_act), but their groups "
            f"'{base}.g_idx' are in no file of the checkpoint. Download the missing file."
        )
    if order is not None:
        check_shape(order, ("I32",), (columns,), why)
        parts.append(Part(order, np.dtype(np.int32), (columns,), None))
    codec = Gptq(bits, columns, group_size, quantization.zero_stored_less_one)
    return StoredTensor(f"{base}.weight", shape, codec, tuple(parts))


def partners(base: str, words: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """The scales and zero points of a packed weight.

    Raises:
        MissingPartnerError: If one is missing.
    """
    return partner(f"{base}.scales", words, tensors), partner(f"{base}.qzeros", words, tensors)


def matrix(words: TensorInfo, shape: Shape) -> tuple[int, int]:
    """The logical rows and columns of a packed weight.

    Raises:
        ShapeError: If it is no matrix.
    """
    if len(shape) != 2 or len(words.shape) != 2:
        raise ShapeError(
            f"{words.file}: tensor '{words.name}' is {words.dtype}{list(words.shape)}; packed are matrices only, but "
            f"config.json gives {list(shape)}."
        )
    return shape[0], shape[1]


def group_size_of(scale: TensorInfo, columns: int, quantization: QuantizationConfig) -> int:
    """How many inputs share a scale: the announced number that gives the stored number of scales.

    Raises:
        ShapeError: If none does.
    """
    groups = scale.shape[0] if scale.shape else 0
    announced = [columns if size == ONE_GROUP else min(size, columns) for size in sorted(quantization.group_sizes)]
    if not announced and groups and columns % groups == 0:
        announced = [columns // groups]
    for size in announced:
        if math.ceil(columns / size) == groups:
            return size
    raise ShapeError(
        f"{scale.file}: tensor '{scale.name}' is {scale.dtype}{list(scale.shape)}: {groups} groups for {columns} "
        f"inputs, but the quantization_config says groups of {' or '.join(map(str, announced)) or '?'}. Use the "
        "config.json that was published with the weights."
    )
