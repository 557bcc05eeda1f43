"""Boxes: axis-aligned regions of an array, the unit in which everything is planned, read, computed and written."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `i` of an array with `start[a] <= i[a] < stop[a]` for each axis `a`.

    Attributes:
        start: The first index of each axis.
        stop: One past the last index of each axis; never below `start`.
    """

    start: Shape
    stop: Shape

    @classmethod
    def whole(cls, shape: Shape) -> "Box":
        """The box that covers an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        """The extent of each axis."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index for NumPy, JAX and TensorStore arrays."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    def with_axis(self, axis: int, start: int, stop: int) -> "Box":
        """The same box with another range on one axis (which may be negative, counted from the end)."""
        axis %= len(self.start)
        return Box(
            self.start[:axis] + (start,) + self.start[axis + 1 :],
            self.stop[:axis] + (stop,) + self.stop[axis + 1 :],
        )

    def is_contiguous_in(self, shape: Shape) -> bool:
        """Whether the box is one unbroken run of a row-major array of this shape: only its first axis is cut."""
        return self.start[1:] == (0,) * (len(shape) - 1) and self.stop[1:] == shape[1:]

    def tiles(self, tile: Shape) -> Iterator["Box"]:
        """The cells of a grid of `tile`-sized cells, anchored at the origin, that overlap the box, cropped to it."""
        ranges = [
            range(start // step * step, stop, step)
            for start, stop, step in zip(self.start, self.stop, tile, strict=True)
        ]
        for corner in itertools.product(*ranges):
            yield Box(
                tuple(max(low, start) for low, start in zip(corner, self.start, strict=True)),
                tuple(min(low + step, stop) for low, step, stop in zip(corner, tile, self.stop, strict=True)),
            )


def grid_size(shape: Shape, tile: Shape) -> int:
    """The number of tiles that cover an array of this shape."""
    return math.prod(-(-size // step) for size, step in zip(shape, tile, strict=True))
