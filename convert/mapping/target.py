"""The target tree: MaxText's leaves, their shapes, dtypes and stacked axes, for a scanned or an unscanned checkpoint.

MaxText stacks the layers of a scanned model on axis `param_scan_axis` (1 unless told otherwise) of every leaf of rank
above one; an unscanned model has one leaf per layer, `layers_0`, `layers_1`, ... Where layers of several kinds take
turns, a scanned model has a stack for each kind, `layers/layers_0`, `layers/layers_1`, ... Experts are always stacked,
on axis 0: `[experts, layers, in, out]` scanned, `[experts, in, out]` unscanned.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.rules import Rule, Stack

_T = TypeVar("_T")

# MaxText keeps its parameters in the collection `params` of the item's `params`.
ROOT = "params/params"


@dataclass(frozen=True)
class Layout:
    """How the target tree is laid out.

    Attributes:
        scan_layers: Whether layers are stacked into one leaf.
        param_scan_axis: The position of the layer axis in a stacked leaf.
        save_dtype: The dtype of leaves whose rule names none: `bfloat16` or `float32`.
    """

    scan_layers: bool
    param_scan_axis: int = 1
    save_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Leaf:
    """One array of the target tree.

    Attributes:
        path: The tree path, keys joined by `/`.
        rule: The rule whose tensors it holds.
        dtype: The dtype on disk.
        stacked: The stacked axes, as (position in the leaf, stack), positions ascending.
        fixed: Source indices of the stacks that are part of the path instead, as (placeholder, index).
    """

    path: str
    rule: Rule
    dtype: str
    stacked: tuple[tuple[int, Stack], ...]
    fixed: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The array's name in storage: Orbax joins tree keys with dots."""
        return self.path.replace("/", ".")

    @functools.cached_property
    def element_shape(self) -> Shape:
        """The shape that one source tensor takes in the leaf, without the stacked axes."""
        return ops.target_shape(self.rule.ops, self.rule.shape)

    @functools.cached_property
    def shape(self) -> Shape:
        """The leaf's shape."""
        return self._with_stacked(self.element_shape, [stack.size for _, stack in self.stacked])

    @functools.cached_property
    def axes(self) -> tuple[str | None, ...]:
        """MaxText's logical name of each axis."""
        return self._with_stacked(self.rule.axes, [stack.axis for _, stack in self.stacked])

    def element_axis(self, axis: int) -> int:
        """The position in the leaf of an axis of one tensor."""
        stacked = {position for position, _ in self.stacked}
        return [position for position in range(len(self.shape)) if position not in stacked][axis]

    def element_box(self, box: Box) -> Box:
        """The part of each tensor that a box of the leaf holds."""
        axes = [self.element_axis(axis) for axis in range(len(self.element_shape))]
        return Box(tuple(box.start[axis] for axis in axes), tuple(box.stop[axis] for axis in axes))

    def coordinates(self, box: Box) -> Iterator[Shape]:
        """The stack coordinates of the tensors that a box of the leaf holds, in row-major order of the stacked axes."""
        return itertools.product(*(range(box.start[axis], box.stop[axis]) for axis, _ in self.stacked))

    def element_index(self, box: Box, coordinate: Shape) -> tuple[int | slice, ...]:
        """Where the part of the tensor at a stack coordinate lies in an array that holds a box of the leaf."""
        index: list[int | slice] = [slice(None)] * len(self.shape)
        for (axis, _), position in zip(self.stacked, coordinate, strict=True):
            index[axis] = position - box.start[axis]
        return tuple(index)

    def source(self, coordinate: Shape) -> str:
        """The name of the source tensor at a stack coordinate."""
        indices = dict(self.fixed)
        for index, (_, stack) in zip(coordinate, self.stacked, strict=True):
            indices[stack.placeholder] = stack.source_index(index)
        return self.rule.source.format(**indices)

    def _with_stacked(self, element: Sequence[_T], stacked: Sequence[_T]) -> tuple[_T, ...]:
        values = list(element)
        for (position, _), value in zip(self.stacked, stacked, strict=True):
            values.insert(position, value)
        return tuple(values)


def leaves(rule: Rule, layout: Layout) -> list[Leaf]:
    """The leaves that a rule's tensors become: one if its layers are stacked, else one for each layer."""
    always = [stack for stack in rule.stacks if stack.always]
    layers = [stack for stack in rule.stacks if not stack.always]
    rank = len(rule.axes) + len(always)
    scan_axis = layout.param_scan_axis if rule.scan_axis is None else rule.scan_axis
    dtype = rule.dtype or layout.save_dtype
    if layout.scan_layers:
        stacked = [(0, stack) for stack in always]
        for stack in layers:
            position = min(scan_axis, rank)
            stacked = [(at + (at >= position), other) for at, other in stacked] + [(position, stack)]
        path = rule.target.format(**{stack.axis: stack.scanned_path for stack in layers})
        return [Leaf(f"{ROOT}/{path}", rule, dtype, tuple(sorted(stacked, key=lambda item: item[0])), ())]
    stacked = [(0, stack) for stack in always]
    return [
        Leaf(
            f"{ROOT}/{rule.target.format(**{s.axis: s.unscanned_path(i) for s, i in zip(layers, index, strict=True)})}",
            rule,
            dtype,
            tuple(stacked),
            tuple((stack.placeholder, stack.source_index(i)) for stack, i in zip(layers, index, strict=True)),
        )
        for index in itertools.product(*(range(stack.size) for stack in layers))
    ]
