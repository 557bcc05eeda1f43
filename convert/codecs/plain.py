"""Tensors that are stored as ordinary floating point numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor, ValuesCodec
from slicecast.convert.errors import ShapeError
from slicecast.convert.source.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class Plain(ValuesCodec):
    """The values as they stand.

    Attributes:
        dtype: The stored dtype: `bfloat16`, `float16` or `float32`.
    """

    changes_values: ClassVar[bool] = False

    dtype: str

    @property
    def description(self) -> str:
        """The dtype."""
        return self.dtype

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The stored array."""
        return tuple(parts)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """The stored bytes."""
        return rows * math.prod(parts[0].shape[1:]) * parts[0].dtype.itemsize


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
