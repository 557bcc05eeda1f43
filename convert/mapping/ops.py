"""The layout operations of which every rule is made.

An op turns a source array into a target array. It is a frozen dataclass with four pure methods, so that a rule can be
planned on shapes alone, cut into boxes, traced by JAX, and inverted:

* `shape(source)`: the shape of the target array.
* `source_box(box, source)`: the box of the source array that a box of the target needs. Each op maps boxes to boxes; a
  target box for which this cannot be (part of an axis that the op permutes) is widened by nobody: it is a `ValueError`,
  and the planner cuts elsewhere.
* `apply(x, shape)`: the op on a box of the source, `shape` being that of the target box. Traceable by JAX.
* `invert(source)`: the op that undoes this one, for a source array of this shape. An op that leaves elements of the
  source out has none: it is a `ValueError`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from slicecast.convert.box import Box, Shape


class Op(Protocol):
    """One step from a source array to a target array; see the module docstring."""

    def shape(self, source: Shape) -> Shape:
        """The target's shape for a source of this shape; `ValueError` where the op does not fit the source."""

    def source_box(self, box: Box, source: Shape) -> Box:
        """The part of the source that this box of the target needs; `ValueError` where that is no box."""

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The target box of this shape, from the source box `x`."""

    def invert(self, source: Shape) -> "Op":
        """The op that leads back to a source of this shape; `ValueError` where elements of it were left out."""


@dataclass(frozen=True, slots=True)
class Transpose:
    """The axes in another order, as in `numpy.transpose`: target axis `a` is source axis `order[a]`.

    By default `target[i, o] = source[o, i]`: Hugging Face keeps `[out, in]`, MaxText `[in, out]`.

    Attributes:
        order: The source axis of each target axis.
    """

    order: Shape = (1, 0)

    def shape(self, source: Shape) -> Shape:
        """The source's sizes in the new order."""
        if sorted(self.order) != list(range(len(source))):
            raise ValueError(f"axes {list(self.order)} are not those of {list(source)}")
        return tuple(source[axis] for axis in self.order)

    def source_box(self, box: Box, source: Shape) -> Box:
        """The box with its axes in the source's order."""
        axes = _inverse(self.order)
        return Box(tuple(box.start[axis] for axis in axes), tuple(box.stop[axis] for axis in axes))

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The transposed array."""
        return jnp.transpose(x, self.order)

    def invert(self, source: Shape) -> "Transpose":
        """The order that leads back."""
        return Transpose(_inverse(self.order))


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of an axis: `target[..., i, ...] = source[..., start + i, ...]`.

    Storage is read in rows, so only a range of the first axis is read alone; of others the whole axis is.

    Attributes:
        axis: The axis, counted from the front.
        start: The first element taken.
        stop: One past the last.
    """

    axis: int
    start: int
    stop: int

    def shape(self, source: Shape) -> Shape:
        """The source's shape with the range's length on `axis`."""
        if not 0 <= self.start < self.stop <= source[self.axis]:
            raise ValueError(f"axis {self.axis} of {list(source)} has no range {self.start}:{self.stop}")
        return source[: self.axis] + (self.stop - self.start,) + source[self.axis + 1 :]

    def source_box(self, box: Box, source: Shape) -> Box:
        """The box, moved by `start` on the first axis; on another one the box must span the range, and gets it all."""
        if self.axis == 0:
            return box.with_axis(0, box.start[0] + self.start, box.stop[0] + self.start)
        if (box.start[self.axis], box.stop[self.axis]) != (0, self.stop - self.start):
            raise ValueError(f"{box} cuts axis {self.axis} of {list(source)}, of which {self} is taken")
        return box.with_axis(self.axis, 0, source[self.axis])

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The range; of the first axis nothing else is there."""
        return x if self.axis == 0 else jax.lax.slice_in_dim(x, self.start, self.stop, axis=self.axis)

    def invert(self, source: Shape) -> Op:
        """None: the rest of the axis is not in the target."""
        raise ValueError(f"{self} leaves elements of {list(source)} out, so nothing undoes it alone")


@dataclass(frozen=True, slots=True)
class Split:
    """One axis becomes several, row-major: `[..., heads * head_dim, ...]` to `[..., heads, head_dim, ...]`.

    Attributes:
        axis: The source axis, counted from the front.
        sizes: The sizes of the target axes that replace it.
    """

    axis: int
    sizes: Shape

    def shape(self, source: Shape) -> Shape:
        """The source's shape with `axis` replaced by `sizes`."""
        product = 1
        for size in self.sizes:
            product *= size
        if source[self.axis] != product:
            raise ValueError(f"axis {self.axis} of {list(source)} does not split into {list(self.sizes)}")
        return source[: self.axis] + self.sizes + source[self.axis + 1 :]

    def source_box(self, box: Box, source: Shape) -> Box:
        """Row-major runs are boxes: after the first axis that is cut to more than one index, all must be whole."""
        axes = slice(self.axis, self.axis + len(self.sizes))
        start, length = 0, 1
        for low, high, size in zip(box.start[axes], box.stop[axes], self.sizes, strict=True):
            if length > 1 and (low, high) != (0, size):
                raise ValueError(f"{box} is not one run of axis {self.axis}, which splits into {list(self.sizes)}")
            start = start * size + low
            length = length * (high - low) if length == 1 else length * size
        return Box(
            box.start[: self.axis] + (start,) + box.start[axes.stop :],
            box.stop[: self.axis] + (start + length,) + box.stop[axes.stop :],
        )

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The array in the target's shape."""
        return x.reshape(shape)

    def invert(self, source: Shape) -> "Merge":
        """The merge of the same axes."""
        return Merge(self.axis, len(self.sizes))


@dataclass(frozen=True, slots=True)
class Merge:
    """Several neighboring axes become one, row-major; undoes `Split`.

    Attributes:
        axis: The first of the source axes.
        count: How many axes become one.
    """

    axis: int
    count: int

    def shape(self, source: Shape) -> Shape:
        """The source's shape with the axes multiplied into one."""
        product = 1
        for size in source[self.axis : self.axis + self.count]:
            product *= size
        return source[: self.axis] + (product,) + source[self.axis + self.count :]

    def source_box(self, box: Box, source: Shape) -> Box:
        """A run of the merged axis is a box of the source if all axes after the first that it crosses are whole."""
        low, high = box.start[self.axis], box.stop[self.axis]
        start, stop = box.start[: self.axis], box.stop[: self.axis]
        for axis in range(self.axis, self.axis + self.count):
            inner = math.prod(source[axis + 1 : self.axis + self.count])
            first, last = low // inner, (high - 1) // inner
            if first != last and (low % inner or high % inner):
                raise ValueError(f"{box} cuts through the inner axes of {list(source)}, merged from axis {self.axis}")
            start, stop = start + (first,), stop + (last + 1,)
            low, high = (low % inner, (high - 1) % inner + 1) if first == last else (0, inner)
        return Box(start + box.start[self.axis + 1 :], stop + box.stop[self.axis + 1 :])

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The array in the target's shape."""
        return x.reshape(shape)

    def invert(self, source: Shape) -> Split:
        """The split into the source's axes."""
        return Split(self.axis, source[self.axis : self.axis + self.count])


@dataclass(frozen=True, slots=True)
class Stride:
    """Every `step`-th element of an axis: `target[..., i, ...] = source[..., start + step * i, ...]`.

    Two of them take a tensor apart that interleaves two others, as gpt-oss' experts do with gate and up. Its boxes are
    whole periods of the source: they hold the elements that are left out too, for storage is read in runs.

    Attributes:
        axis: The axis, counted from the front.
        start: The first element taken, within the first period.
        step: The period; the axis holds a whole number of them.
    """

    axis: int
    start: int
    step: int

    def shape(self, source: Shape) -> Shape:
        """The source's shape with `axis` divided by `step`."""
        if not 0 <= self.start < self.step or source[self.axis] % self.step:
            raise ValueError(
                f"axis {self.axis} of {list(source)} has no element {self.start} in periods of {self.step}"
            )
        return source[: self.axis] + (source[self.axis] // self.step,) + source[self.axis + 1 :]

    def source_box(self, box: Box, source: Shape) -> Box:
        """The periods from which the box takes an element each."""
        return box.with_axis(self.axis, box.start[self.axis] * self.step, box.stop[self.axis] * self.step)

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """One element of each period."""
        return jax.lax.slice_in_dim(x, self.start, x.shape[self.axis], self.step, self.axis)

    def invert(self, source: Shape) -> Op:
        """None: the other elements of each period are not in the target."""
        raise ValueError(f"{self} leaves elements of {list(source)} out, so nothing undoes it alone")


@dataclass(frozen=True, slots=True)
class InterleaveHalves:
    """Rotary halves to rotary pairs on the last axis: `t[2j] = s[j]`, `t[2j + 1] = s[D/2 + j]`.

    Hugging Face's Llama rotates element `j` with element `D/2 + j`; MaxText's Llama 3.1 rotates neighbors.
    """

    def shape(self, source: Shape) -> Shape:
        """Unchanged; the last axis must be even."""
        if source[-1] % 2:
            raise ValueError(f"InterleaveHalves needs an even last axis, not {list(source)}")
        return source

    def source_box(self, box: Box, source: Shape) -> Box:
        """The same box, which must span the last axis."""
        return _whole_last_axis(box, source)

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The array with its last axis permuted."""
        halves = x.reshape(*shape[:-1], 2, shape[-1] // 2)
        return jnp.swapaxes(halves, -1, -2).reshape(shape)

    def invert(self, source: Shape) -> "DeinterleaveHalves":
        """Pairs back to halves."""
        return DeinterleaveHalves()


@dataclass(frozen=True, slots=True)
class DeinterleaveHalves:
    """Rotary pairs to rotary halves on the last axis; undoes `InterleaveHalves`."""

    def shape(self, source: Shape) -> Shape:
        """Unchanged; the last axis must be even."""
        return InterleaveHalves().shape(source)

    def source_box(self, box: Box, source: Shape) -> Box:
        """The same box, which must span the last axis."""
        return _whole_last_axis(box, source)

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The array with its last axis permuted."""
        pairs = x.reshape(*shape[:-1], shape[-1] // 2, 2)
        return jnp.swapaxes(pairs, -1, -2).reshape(shape)

    def invert(self, source: Shape) -> InterleaveHalves:
        """Halves back to pairs."""
        return InterleaveHalves()


class Computing:
    """What ops have in common that compute with each value alone; all other ops only move values."""

    __slots__ = ()

    def shape(self, source: Shape) -> Shape:
        """Unchanged."""
        return source

    def source_box(self, box: Box, source: Shape) -> Box:
        """Unchanged."""
        return box


@dataclass(frozen=True, slots=True)
class Scale(Computing):
    """`target = source * factor`, in float32 whatever the source's dtype; the one rounding comes at the end.

    Attributes:
        factor: The multiplier; it is used as a float32.
    """

    factor: float

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The scaled array as float32."""
        scaled: jax.Array = x.astype(jnp.float32) * jnp.float32(self.factor)
        return scaled

    def invert(self, source: Shape) -> "Scale":
        """Division as a multiplication; exact only where the factor is a power of two."""
        return Scale(1.0 / self.factor)


@dataclass(frozen=True, slots=True)
class Offset(Computing):
    """`target = source + term`, in float32 whatever the source's dtype; the one rounding comes at the end.

    Attributes:
        term: The summand; it is used as a float32.
    """

    term: float

    def apply(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The sum as float32."""
        moved: jax.Array = x.astype(jnp.float32) + jnp.float32(self.term)
        return moved

    def invert(self, source: Shape) -> "Offset":
        """Subtraction; exact where the sum was."""
        return Offset(-self.term)


def _inverse(order: Shape) -> Shape:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _whole_last_axis(box: Box, source: Shape) -> Box:
    if (box.start[-1], box.stop[-1]) != (0, source[-1]):
        raise ValueError(f"{box} cuts the last axis of {list(source)}, which is permuted")
    return box


def target_shape(ops: Sequence[Op], source: Shape) -> Shape:
    """The shape that a chain of ops gives, applied first to last."""
    for op in ops:
        source = op.shape(source)
    return source


def boxes(ops: Sequence[Op], box: Box, source: Shape) -> tuple[Box, ...]:
    """The box of the source that a box of the chain's target needs, and the boxes after each op, the last being `box`.

    Raises:
        ValueError: Where the needed part of the source is no box.
    """
    shapes = [source]
    for op in ops:
        shapes.append(op.shape(shapes[-1]))
    chain = [box]
    for op, shape in zip(reversed(ops), reversed(shapes[:-1]), strict=True):
        chain.append(op.source_box(chain[-1], shape))
    return tuple(reversed(chain))


def apply(ops: Sequence[Op], x: jax.Array, shapes: Sequence[Shape]) -> jax.Array:
    """A box of the chain's target from a box `x` of its source; `shapes` are those of `boxes(...)[1:]`. Traceable."""
    for op, shape in zip(ops, shapes, strict=True):
        x = op.apply(x, shape)
    return x


def taken(ops: Sequence[Op], source: Shape) -> tuple[tuple[slice, ...], tuple[Op, ...]]:
    """What a chain takes of its source, as an index, and the ops that come after, which leave nothing out.

    Together the rules of a tensor take all of it, so that it can be put together again from their leaves.
    """
    index = [slice(None)] * len(source)
    for position, op in enumerate(ops):
        match op:
            case Slice(axis, start, stop):
                index[axis] = slice(start, stop)
            case Stride(axis, start, step):
                index[axis] = slice(start, None, step)
            case _:
                return tuple(index), tuple(ops[position:])
    return tuple(index), ()


def invert(ops: Sequence[Op], source: Shape) -> tuple[Op, ...]:
    """The chain that undoes this one, for a source of this shape.

    Raises:
        ValueError: Where an op leaves elements out.
    """
    inverse: list[Op] = []
    for op in ops:
        inverse.insert(0, op.invert(source))
        source = op.shape(source)
    return tuple(inverse)
