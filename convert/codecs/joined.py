"""Tensors that are made of rows of several stored tensors, each stored in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import Codec, Kernel, Part, StoredTensor
from slicecast.kernels.implementation import Implementation


@dataclass(frozen=True, slots=True)
class Joined:
    """Rows of several tensors in turn.

    In each of `groups` turns each take gives an equal part of its rows. The tensors are always decoded whole.

    Attributes:
        codecs: How each tensor becomes values.
        rows: The rows of each.
        parts: How many stored parts each has.
        takes: Of which tensor which rows are taken, as (tensor, start, stop).
        groups: The number of turns.
    """

    changes_values: ClassVar[bool] = True
    row_unit: ClassVar[int] = 1

    codecs: tuple[Codec, ...]
    rows: tuple[int, ...]
    parts: tuple[int, ...]
    takes: tuple[tuple[int, int, int], ...]
    groups: int

    @property
    def description(self) -> str:
        """How the tensors are stored."""
        return " + ".join(dict.fromkeys(codec.description for codec in self.codecs)) + ", joined"

    @property
    def kernel(self) -> Kernel | None:
        """The kernel of the tensors, if one decodes them."""
        return next((codec.kernel for codec in self.codecs if codec.kernel is not None), None)

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """None of the arrays is divided."""
        return tuple(None for codec in self.codecs for _ in codec.row_axes)

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """What each tensor's codec prepares."""
        prepared: list[np.ndarray] = []
        for codec, rows, (first, last) in zip(self.codecs, self.rows, _ranges(self.parts), strict=True):
            prepared += codec.prepare(parts[first:last], 0, rows)
        return tuple(prepared)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """The sum over the tensors."""
        return sum(
            codec.prepared_bytes(parts[first:last], rows)
            for codec, rows, (first, last) in zip(self.codecs, self.rows, _ranges(self.parts), strict=True)
        )

    def decode(
        self,
        arrays: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """The joined values, `[batch, rows, columns]`, or transposed."""
        counts = [len(codec.row_axes) for codec in self.codecs]
        values = [
            codec.decode(arrays[first:last], dtype=dtype, transposed=False, implementation=implementation)
            for codec, (first, last) in zip(self.codecs, _ranges(counts), strict=True)
        ]
        taken = [values[tensor][:, start:stop] for tensor, start, stop in self.takes]
        # [batch, turns, rows of a turn, columns], joined along the rows of a turn.
        turns = [x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]) for x in taken]
        joined = jnp.concatenate(turns, axis=2)
        joined = joined.reshape(joined.shape[0], -1, *joined.shape[3:])
        return jnp.swapaxes(joined, 1, 2) if transposed else joined


def stored(
    name: str, shape: Shape, members: Sequence[StoredTensor], takes: tuple[tuple[int, int, int], ...], groups: int
) -> StoredTensor:
    """The tensor that stored tensors make together.

    Raises:
        ValueError: If the takes do not give this shape, or the tensors do not have them.
    """
    lengths = [stop - start for _, start, stop in takes]
    if any(length % groups for length in lengths) or sum(lengths) != shape[0]:
        raise ValueError(f"{name}: {lengths} rows, taken in {groups} turns, do not make {list(shape)}")
    if any(not 0 <= start < stop <= members[member].shape[0] for member, start, stop in takes):
        raise ValueError(f"{name}: rows are taken that the tensors do not have: {takes}")
    if any(member.shape[1:] != shape[1:] for member in members):
        raise ValueError(f"{name}: the tensors' rows are not those of {list(shape)}")
    codec = Joined(
        codecs=tuple(member.codec for member in members),
        rows=tuple(member.shape[0] for member in members),
        parts=tuple(len(member.parts) for member in members),
        takes=takes,
        groups=groups,
    )
    parts = tuple(replace(part, axis=None) for member in members for part in member.parts)
    unread = tuple(other for member in members for other in member.unread)
    return StoredTensor(name, shape, codec, parts, unread)


def member_tensors(tensor: StoredTensor) -> list[StoredTensor]:
    """The tensors that a joined one is made of."""
    codec = tensor.codec
    assert isinstance(codec, Joined), "the caller asks for joined tensors"
    return [
        StoredTensor(tensor.name, (rows, *tensor.shape[1:]), each, tensor.parts[first:last])
        for each, rows, (first, last) in zip(codec.codecs, codec.rows, _ranges(codec.parts), strict=True)
    ]


def _ranges(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive ranges of these lengths."""
    return list(pairwise(accumulate(lengths, initial=0)))
