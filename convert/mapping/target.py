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
from slicecast.convert.mapping.rules import Rule

_T = TypeVar("_T")

# MaxText keeps its parameters in the collection `params` of the item's `params`.
ROOT = "params/params"

# The dtype of weights that stay FP8.
FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Layout:
    """How the target tree is laid out.

    Attributes:
        scan_layers: Whether layers are stacked into one leaf.
        param_scan_axis: The position of the layer axis in a stacked leaf.
        save_dtype: The dtype of leaves whose rule names none: `bfloat16` or `float32`; or `float8_e4m3fn`, which keeps
            FP8 weights as they are, beside leaves in bfloat16.
    """

    scan_layers: bool
    param_scan_axis: int = 1
    save_dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class Stack:
    """An axis of a leaf along which equal tensors are stacked.

    Attributes:
        placeholder: What it counts in source names: `layer` or `expert`.
        axis: MaxText's logical name of the axis.
        size: How many tensors are stacked.
        step: The distance between the numbers of neighbors in source names.
    """

    placeholder: str
    axis: str
    size: int
    step: int = 1


@dataclass(frozen=True)
class Leaf:
    """One array of the target tree.

    Attributes:
        path: The tree path, keys joined by `/`.
        rule: The rule whose tensors it holds.
        dtype: The dtype on disk.
        stacked: The stacked axes, as (position in the leaf, stack), positions ascending.
        layer: The number of the first layer, or of the only one, in source names; None outside of layers.
    """

    path: str
    rule: Rule
    dtype: str
    stacked: tuple[tuple[int, Stack], ...]
    layer: int | None

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

    def source(self, name: str, coordinate: Shape) -> str:
        """A name with placeholders, such as that of the rule's source, for the tensor at a stack coordinate."""
        numbers = {"layer": self.layer or 0, "expert": 0}
        for index, (_, stack) in zip(coordinate, self.stacked, strict=True):
            numbers[stack.placeholder] += index * stack.step
        return name.format(**numbers)

    def _with_stacked(self, element: Sequence[_T], stacked: Sequence[_T]) -> tuple[_T, ...]:
        values = list(element)
        for (position, _), value in zip(self.stacked, stacked, strict=True):
            values.insert(position, value)
        return tuple(values)


def leaves(rule: Rule, layout: Layout) -> list[Leaf]:
    """The leaves that a rule's tensors become: one if its layers are stacked, else one for each layer."""
    experts = [] if rule.experts is None else [Stack("expert", "exp", rule.experts)]
    dtype = rule.dtype or (layout.save_dtype if layout.save_dtype != FP8 else "bfloat16")
    layers = rule.layers
    if layers is None:
        return [Leaf(f"{ROOT}/{rule.target}", rule, dtype, tuple(enumerate(experts)), None)]
    if layout.scan_layers:
        stacks = [Stack("layer", axis.name, axis.size, axis.step) for axis in layers.axes]
        scan_axis = layout.param_scan_axis if rule.scan_axis is None else rule.scan_axis
        first = min(scan_axis, len(rule.axes) + len(experts))
        stacked = [(first + index, stack) for index, stack in enumerate(stacks)]
        stacked += [(len(stacks) if first == 0 else 0, stack) for stack in experts]
        path = rule.target.format(layers=layers.scanned)
        return [Leaf(f"{ROOT}/{path}", rule, dtype, tuple(sorted(stacked, key=lambda item: item[0])), layers.start)]
    found = []
    for index, steps in enumerate(itertools.product(*(range(axis.size) for axis in layers.axes))):
        layer = layers.start + sum(step * axis.step for step, axis in zip(steps, layers.axes, strict=True))
        path = rule.target.format(layers=layers.unscanned.format(layer=layer, index=index))
        found.append(Leaf(f"{ROOT}/{path}", rule, dtype, tuple(enumerate(experts)), layer))
    return found
