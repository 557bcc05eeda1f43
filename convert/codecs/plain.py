"""Tensors that are stored as ordinary floating point numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor
from slicecast.convert.errors import ShapeError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.int4_grouped import Implementation


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

    def decode(
        self,
        parts: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The array, transposed before it is widened so that fewer bytes move."""
        (x,) = parts
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
