"""Compares a checkpoint with its source, value by value, on a path of its own.

The expected values are recomputed with NumPy alone (`definition.py`): no code of the codecs, ops, kernels or the reader
is used, only the rules and the index. In particular, which rows of a source tensor belong to a region of a leaf is
found by sending row numbers through the rule's ops, not by the planner's arithmetic.

Values are compared bit for bit, with two exceptions that floating point units leave open: two NaNs are equal whatever
their payload, and where values were computed (not only moved), a result below 2**-126 may have become a zero of the
same sign.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  Makes NumPy know bfloat16.
import numpy as np
import tensorstore as ts

from slicecast.convert import definition
from slicecast.convert.box import Box
from slicecast.convert.mapping.ops import (
    Computing,
    DeinterleaveHalves,
    InterleaveHalves,
    Merge,
    Offset,
    Op,
    Scale,
    Slice,
    Split,
    Stride,
    Transpose,
)
from slicecast.convert.plan import Plan, PlannedLeaf, WorkBox

Array = np.ndarray

# The smallest normal float32 and bfloat16: 2**-126. Products below it are subnormal, and XLA on CPU and TPU make them
# zero.
_SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class Difference:
    """A leaf that is not what the source gives.

    Attributes:
        path: The leaf.
        detail: What is different.
    """

    path: str
    detail: str

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.path} {self.detail}"


def compare_trees(plan: Plan, arrays: Mapping[str, ts.TensorStore]) -> list[Difference]:
    """Missing and surplus leaves, and leaves of another shape or dtype."""
    expected = {planned.leaf.path: planned.leaf for planned in plan.leaves}
    differences = [Difference(path, "is missing") for path in expected if path not in arrays]
    differences += [Difference(path, "is not expected") for path in arrays if path not in expected]
    for path, leaf in expected.items():
        array = arrays.get(path)
        if array is not None and (array.shape != leaf.shape or array.dtype.name != leaf.dtype):
            found = f"{array.dtype.name}{list(array.shape)}"
            differences.append(Difference(path, f"is {found}, expected {leaf.dtype}{list(leaf.shape)}"))
    return differences


def compare_values(
    plan: Plan, arrays: Mapping[str, ts.TensorStore], report: Callable[[int], None], workers: int
) -> list[Difference]:
    """Leaves whose values differ.

    Args:
        plan: The plan that the checkpoint was made by.
        arrays: The checkpoint's arrays, of the expected shapes and dtypes.
        report: Called with the number of bytes compared, after each box.
        workers: How many boxes are compared at once; each takes a few times its size in memory.
    """
    wrong: dict[str, list[tuple[int, str]]] = {}

    def check(work: WorkBox) -> None:
        leaf = work.leaf.leaf
        try:
            found = arrays[leaf.path][work.box.slices].read().result()
        except ValueError as error:  # TensorStore's error for data that fails its checksum or cannot be decoded.
            wrong.setdefault(leaf.path, []).append((0, f"cannot be read: {str(error).splitlines()[0]}"))
            return
        count, example = _difference(found, _expected(plan, work.leaf, work.box), work)
        if count:
            wrong.setdefault(leaf.path, []).append((count, example))
        report(work.costs.out_bytes)

    with ThreadPoolExecutor(workers, thread_name_prefix="slicecast-verify") as pool:
        for _ in pool.map(check, plan.boxes):
            pass
    return [
        Difference(
            path, f"{sum(count for count, _ in found)} values differ; {found[0][1]}" if found[0][0] else found[0][1]
        )
        for path, found in sorted(wrong.items())
    ]


def _difference(found: Array, expected: Array, work: WorkBox) -> tuple[int, str]:
    """How many values differ, and a sentence about the first."""
    bits = np.dtype(f"u{found.dtype.itemsize}")
    unequal = found.view(bits) != np.ascontiguousarray(expected).view(bits)
    if not unequal.any():
        return 0, ""
    with np.errstate(invalid="ignore"):  # NaNs are compared too.
        mine, theirs = found[unequal].astype(np.float64), expected[unequal].astype(np.float64)
    same = np.isnan(mine) & np.isnan(theirs)
    if _computes(work):
        flushed = (mine == 0) & (np.abs(theirs) < _SMALLEST_NORMAL) & (np.signbit(mine) == np.signbit(theirs))
        same |= flushed
    count = int(np.count_nonzero(~same))
    if not count:
        return 0, ""
    first = int(np.flatnonzero(~same)[0])
    where = [int(axis[first]) + start for axis, start in zip(np.nonzero(unequal), work.box.start, strict=True)]
    return count, f"the first is at {where}: {float(mine[first])!r}, expected {float(theirs[first])!r}"


def _computes(work: WorkBox) -> bool:
    """Whether the values of a box were computed or converted, not only moved."""
    leaf = work.leaf.leaf
    return any(isinstance(op, Computing) for op in leaf.rule.ops) or any(
        tensor.codec.changes_values or tensor.parts[0].dtype.name != leaf.dtype
        for tensor in work.leaf.tensors(work.box)
    )


def _expected(plan: Plan, planned: PlannedLeaf, box: Box) -> Array:
    """The values that a region of a leaf should have."""
    leaf = planned.leaf
    element = leaf.element_box(box)
    start, stop = source_rows(leaf.rule.ops, leaf.rule.shape, element)
    values = np.empty(box.shape, np.dtype(leaf.dtype))
    for coordinate in leaf.coordinates(box):
        rows = definition.rows(plan.checkpoint.storage, planned.sources[coordinate], start, stop)
        values[leaf.element_index(box, coordinate)] = (
            layout(leaf.rule.ops, rows).reshape(element.shape).astype(leaf.dtype)
        )
    return values


def source_rows(ops: Sequence[Op], source: tuple[int, ...], element: Box) -> tuple[int, int]:
    """The rows of the source that land in a box of the target, by sending each element's row number through the ops."""
    numbers = np.arange(source[0]).reshape([-1] + [1] * (len(source) - 1))
    # A view in which all columns share their row's number, so it takes no memory however large the tensor is.
    numbers = np.broadcast_to(numbers, source)
    for op in ops:
        if not isinstance(op, (Computing, InterleaveHalves, DeinterleaveHalves)):
            numbers = _moved(op, numbers, rows_chosen=False)
        elif not isinstance(op, Computing) and (element.start[-1], element.stop[-1]) != (0, numbers.shape[-1]):
            raise ValueError(f"{element} cuts an axis that {op} permutes")
    part = numbers[element.slices]
    # Along an axis with stride 0 all numbers are equal: one of them is enough.
    part = part[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in part.strides)]
    rows = np.unique(part)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if len(rows) != stop - start:
        raise ValueError(f"{element} does not come from neighboring rows")
    return start, stop


def layout(ops: Sequence[Op], x: Array) -> Array:
    """The ops in NumPy, on those rows of the source that `source_rows` gives."""
    for op in ops:
        x = _moved(op, x, rows_chosen=True)
    return x


def _moved(op: Op, x: Array, *, rows_chosen: bool) -> Array:
    """One op; ranges of rows are there already if they were chosen.

    The first size of a split follows from the rows that are there.
    """
    match op:
        case Transpose(order):
            return x.transpose(order)
        case Slice(axis, start, stop):
            return x if axis == 0 and rows_chosen else x[(slice(None),) * axis + (slice(start, stop),)]
        case Split(axis, sizes):
            return x.reshape(x.shape[:axis] + _run(x.shape[axis], sizes) + x.shape[axis + 1 :])
        case Merge(axis, count):
            return x.reshape(x.shape[:axis] + (-1,) + x.shape[axis + count :])
        case Stride(axis, start, step):
            return x[(slice(None),) * axis + (slice(start, None, step),)]
        case InterleaveHalves():
            target = np.empty_like(x)
            target[..., 0::2], target[..., 1::2] = np.split(x, 2, axis=-1)
            return target
        case DeinterleaveHalves():
            return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        case Scale(factor):
            with np.errstate(invalid="ignore"):
                return np.multiply(x.astype(np.float32), np.float32(factor))
        case Offset(term):
            return x.astype(np.float32) + np.float32(term)
    raise TypeError(f"verify does not know the op {op}")


def _run(length: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row-major run of so many elements of an array of these sizes."""
    inner = math.prod(sizes[1:])
    return (length // inner, *sizes[1:]) if length % inner == 0 else (1, *_run(length, sizes[1:]))
