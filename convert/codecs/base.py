"""The interface of a codec, and the record of a stored tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.source.reader import Span
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.int4_grouped import Implementation

# Stored dtypes that are numbers by themselves, as (header spelling, NumPy dtype).
FLOAT_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


class Codec(Protocol):
    """How the stored parts of a tensor become its values. Frozen and hashable: a static argument of `jax.jit`."""

    @property
    def description(self) -> str:
        """What the plan calls it, for example `int4 pack-quantized, group 32`."""

    @property
    def changes_values(self) -> bool:
        """False if decoding to the stored dtype gives the stored bytes back."""

    def decode(
        self,
        parts: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The tensor's values, from the same rows of each part.

        All arithmetic is float32 and is rounded once, to `dtype`.

        Args:
            parts: One array for each part, `[batch, rows, ...]`.
            dtype: bfloat16 or float32.
            transposed: Whether to return `[batch, columns, rows]` in place of `[batch, rows, columns]`.
            implementation: Which kernel computes them, for codecs that have one.
        """


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that holds part of a logical tensor's information, viewed as an array of bytes or numbers.

    Attributes:
        tensor: Where the bytes are.
        dtype: The NumPy dtype of the view.
        shape: The shape of the view. Its first axis is the logical tensor's first axis.
    """

    tensor: TensorInfo
    dtype: np.dtype
    shape: Shape

    @property
    def row_bytes(self) -> int:
        """Bytes for each index of the first axis."""
        return self.tensor.nbytes // self.shape[0] if self.shape[0] else 0

    def span(self, start: int, stop: int) -> Span:
        """The byte range of the rows `start` to `stop`."""
        return Span(self.tensor.file, self.tensor.offset + start * self.row_bytes, (stop - start) * self.row_bytes)

    def view(self, data: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The bytes of `span(start, stop)` as an array `[stop - start, ...]`."""
        return data.view(self.dtype).reshape((stop - start, *self.shape[1:]))


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

    @property
    def row_bytes(self) -> int:
        """Bytes read for each index of the first axis."""
        return sum(part.row_bytes for part in self.parts)
