"""Tensors that are stored as ordinary floating point numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Kernel, Part, StoredTensor
from slicecast.convert.errors import ShapeError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.implementation import Implementation


@dataclass(frozen=True, slots=True)
class Plain:
    """The values as they stand.

    Attributes:
        dtype: The stored dtype: `bfloat16`, `float16` or `float32`.
    """

    dtype: str

    @property
    def description(self) -> str:
        """The dtype."""
        return self.dtype

    @property
    def changes_values(self) -> bool:
        """Never."""
        return False

    @property
    def kernel(self) -> Kernel | None:
        """XLA does it."""
        return None

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """One array, rows first."""
        return (0,)

    @property
    def row_unit(self) -> int:
        """Rows are apart."""
        return 1

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The stored array."""
        return tuple(parts)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """The stored bytes."""
        return rows * math.prod(parts[0].shape[1:]) * parts[0].dtype.itemsize

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        rows: int,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The array, transposed before it is widened so that fewer bytes move."""
        (x,) = arrays
        if transposed:
            x = jnp.swapaxes(x, 1, 2)
        return x.astype(dtype)


def stored(tensor: TensorInfo, shape: Shape) -> StoredTensor:
    """The logical tensor that a plain tensor is.

    Raises:
        ShapeError: If the header's shape is not the one that `config.json` gives.
    """
    if tensor.shape != shape:
        raise ShapeError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}, but config.json gives "
            f"{list(shape)}. Use the config.json that was published with the weights."
        )
    dtype = FLOAT_DTYPES[tensor.dtype]
    return StoredTensor(tensor.name, shape, Plain(dtype.name), (Part(tensor, dtype, shape),))
