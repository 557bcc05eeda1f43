"""The interface of a codec, and the record of a stored tensor.

A codec turns the stored parts of a tensor into its values in two steps. `prepare` runs on the host, in NumPy, and does
what is cheap there and awkward on a chip: it repeats block scales, unpacks zero points, and for small rare formats the
whole work. `decode` runs on the chips, is traced by JAX, and does the arithmetic.

Work is cut along the logical tensor's first axis, its rows: both steps take any range of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.errors import SlicecastError
from slicecast.convert.source.reader import Bytes, Span
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.implementation import Implementation

# Stored dtypes that are numbers by themselves, as (header spelling, NumPy dtype).
FLOAT_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

Kernel = Literal["grouped", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that holds part of a logical tensor's information, viewed as an array of bytes or numbers.

    Attributes:
        tensor: Where the bytes are.
        dtype: The NumPy dtype of the view.
        shape: The shape of the view.
        axis: The axis of the view that follows the logical tensor's rows; None if the part is read whole.
        per_row: How many indices of that axis belong to each row: 1/128 where 128 rows share one.
        within: The range of the second axis that is read; None for all of it. `shape` has its length.
    """

    tensor: TensorInfo
    dtype: np.dtype
    shape: Shape
    axis: int | None = 0
    per_row: Fraction = Fraction(1)
    within: tuple[int, int] | None = None

    def indices(self, start: int, stop: int) -> tuple[int, int]:
        """The range of indices on `axis` that covers the rows `start` to `stop`."""
        if self.per_row == 1:
            # A tensor may have fewer rows than the model: the others are zeros.
            size = stop if self.axis is None else self.shape[self.axis]
            return min(start, size), min(stop, size)
        indices, rows = self.per_row.as_integer_ratio()
        return start * indices // rows, -(-stop * indices // rows)

    def spans(self, start: int, stop: int) -> list[Span]:
        """The byte ranges that hold the rows `start` to `stop`: one for each index of the axes before `axis`."""
        if self.axis is None:
            return [Span(self.tensor.file, self.tensor.offset, self.tensor.nbytes)]
        first, last = self.indices(start, stop)
        if self.within is not None:
            row_bytes = self.tensor.nbytes // self.tensor.shape[0]
            index_bytes = row_bytes // self.tensor.shape[1]
            offset = self.tensor.offset + self.within[0] * index_bytes
            nbytes = (self.within[1] - self.within[0]) * index_bytes
            return [Span(self.tensor.file, offset + row * row_bytes, nbytes) for row in range(first, last)]
        size = self.shape[self.axis]
        if (first, last) == (0, size):
            return [Span(self.tensor.file, self.tensor.offset, self.tensor.nbytes)]
        outer = math.prod(self.shape[: self.axis])
        index_bytes = self.tensor.nbytes // max(outer * size, 1)
        offsets = (self.tensor.offset + (i * size + first) * index_bytes for i in range(outer))
        return [Span(self.tensor.file, offset, (last - first) * index_bytes) for offset in offsets]

    def view(self, data: Sequence[Bytes], start: int, stop: int) -> np.ndarray:
        """The bytes of `spans(start, stop)` as an array: `shape`, with the covering range of indices on `axis`."""
        shape = list(self.shape)
        if self.axis is not None:
            first, last = self.indices(start, stop)
            shape[self.axis] = last - first
        joined = data[0] if len(data) == 1 else np.concatenate(data)
        return joined.view(self.dtype).reshape(shape)


class Codec(Protocol):
    """How the stored parts of a tensor become its values. Frozen and hashable: a static argument of `jax.jit`."""

    @property
    def description(self) -> str:
        """What the plan calls it, for example `int4 pack-quantized, group 32`."""

    @property
    def changes_values(self) -> bool:
        """False if decoding to the stored dtype gives the stored bytes back."""

    @property
    def kernel(self) -> Kernel | None:
        """The folder of `kernels` that decodes it; None if XLA or the host does."""

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """For each prepared array, the axis that follows the rows; None where the array belongs to the whole tensor."""

    @property
    def row_unit(self) -> int:
        """How many rows a prepared array keeps together, for example 8 in a word; chips share whole units."""

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """What goes to the chips for the rows `start` to `stop`.

        Args:
            parts: For each part, its view of these rows.
            start: The first row.
            stop: One past the last row.

        Raises:
            ShapeError, UnsupportedFormatError: If the parts' contents say something else than their headers. The
                message goes on from the tensor's name.
        """

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """The size of what `prepare` gives for so many rows, in bytes, or a bound where that depends on contents."""

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The tensor's values from the prepared arrays.

        All arithmetic is float32 and is rounded once, to `dtype`.

        Args:
            arrays: The prepared arrays of several tensors, stacked on a new first axis.
            dtype: bfloat16 or float32.
            transposed: Whether to return `[batch, columns, rows]` in place of `[batch, rows, columns]`.
            implementation: Which kernel computes them, for codecs that have one.
        """


class ValuesCodec:
    """What codecs have in common whose one prepared array is the values, `[rows, ...]`, at least as wide as needed."""

    __slots__ = ()

    kernel: ClassVar[Kernel | None] = None
    row_axes: ClassVar[tuple[int | None, ...]] = (0,)
    row_unit: ClassVar[int] = 1

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The array, transposed before it is widened so that fewer bytes move."""
        (x,) = arrays
        if transposed:
            x = jnp.swapaxes(x, 1, 2)
        return x.astype(dtype)


def group_name(group_size: int, columns: int) -> str:
    """What descriptions call a group of columns that share a scale."""
    return "channel" if group_size >= columns else f"group {group_size}"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor of the checkpoint: what a rule's source name stands for.

    Attributes:
        name: The name in the rules, for example `...gate_proj.weight`.
        shape: Its logical shape.
        codec: How its parts become values.
        parts: What is read, in the order in which the codec takes it.
        unread: Names of further tensors that belong to it but need not be read.
    """

    name: str
    shape: Shape
    codec: Codec
    parts: tuple[Part, ...]
    unread: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors of the checkpoint that it uses up."""
        return tuple(part.tensor.name for part in self.parts) + self.unread

    def read_bytes(self, start: int, stop: int) -> int:
        """Bytes read for the rows `start` to `stop`."""
        return sum(span.nbytes for part in self.parts for span in part.spans(start, stop))

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The codec's `prepare`, of which errors name the tensor.

        Raises:
            ShapeError, UnsupportedFormatError: If the parts' contents say something else than their headers.
        """
        try:
            return self.codec.prepare(parts, start, stop)
        except SlicecastError as error:
            tensor = self.parts[0].tensor
            raise type(error)(f"{tensor.file}: tensor '{tensor.name}' {error}") from None

    def prepared_bytes(self, rows: int) -> int:
        """Bytes that go to the chips for so many rows, at most."""
        return self.codec.prepared_bytes(self.parts, rows)
