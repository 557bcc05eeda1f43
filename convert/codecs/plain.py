"""Tensors that are stored as ordinary numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor, ValuesCodec
from slicecast.convert.errors import ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo

# Stored whole numbers, as (header spelling, NumPy dtype).
INTEGER_DTYPES: dict[str, np.dtype] = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}

# Up to here float32 has every whole number.
_EXACT = 1 << 24


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
        """The stored array, and rows of zeros where the model has more rows."""
        (values,) = parts
        missing = stop - start - len(values)
        if missing == 0:
            return (values,)
        return (np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)]),)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """The stored bytes."""
        return rows * math.prod(parts[0].shape[1:]) * parts[0].dtype.itemsize


@dataclass(frozen=True, slots=True)
class Integers(ValuesCodec):
    """Whole numbers, which MaxText keeps as floating point numbers: tables of experts."""

    changes_values: ClassVar[bool] = True

    dtype: str

    @property
    def description(self) -> str:
        """The dtype."""
        return self.dtype

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The numbers as float32.

        Raises:
            UnsupportedFormatError: If one is so large that float32 may not have it.
        """
        (numbers,) = parts
        beyond = numbers[(numbers > _EXACT) | (numbers < -_EXACT)]
        if beyond.size:
            raise UnsupportedFormatError(
                f"holds {beyond[0]}; float32 has every whole number up to {_EXACT}, and MaxText keeps float32 here."
            )
        return (numbers.astype(np.float32),)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """Their size as float32."""
        return rows * math.prod(parts[0].shape[1:]) * np.dtype(np.float32).itemsize


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
    if tensor.dtype in INTEGER_DTYPES:
        dtype = INTEGER_DTYPES[tensor.dtype]
        return StoredTensor(tensor.name, shape, Integers(dtype.name), (Part(tensor, dtype, shape),))
    dtype = FLOAT_DTYPES[tensor.dtype]
    return StoredTensor(tensor.name, shape, Plain(dtype.name), (Part(tensor, dtype, tensor.shape),))
