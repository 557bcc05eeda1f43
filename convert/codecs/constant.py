"""Tensors that no checkpoint has, all elements of which are equal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import Part, StoredTensor, ValuesCodec


@dataclass(frozen=True, slots=True)
class Constant(ValuesCodec):
    """The same value everywhere.

    Attributes:
        value: The value; it is used as a float32.
        columns: The shape of a row.
    """

    changes_values: ClassVar[bool] = True

    value: float
    columns: Shape

    @property
    def description(self) -> str:
        """The value."""
        return f"constant {self.value:g}"

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The rows."""
        return (np.full((stop - start, *self.columns), self.value, np.float32),)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """Their size as float32."""
        return rows * math.prod(self.columns) * np.dtype(np.float32).itemsize


def stored(name: str, shape: Shape, value: float) -> StoredTensor:
    """A tensor of this shape, for which nothing is read."""
    return StoredTensor(name, shape, Constant(value, shape[1:]), ())
