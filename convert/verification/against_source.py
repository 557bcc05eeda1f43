"""Compares a checkpoint with its source, value by value, on a path of its own.

The expected values are recomputed with NumPy alone (`definition.py`): no code of the codecs, ops, kernels or the reader
is used, only the rules and the index. In particular, which rows of a source tensor belong to a region of a leaf is
found by sending row numbers through the rule's ops, not by the planner's arithmetic.

Values are compared bit for bit, with two exceptions that floating point units leave open: two NaNs are equal whatever
their payload, and where values were computed (not only moved), a result below 2**-126 may have become a zero of the
same sign.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  Makes NumPy know bfloat16.
import numpy as np
import tensorstore as ts

from slicecast.convert.box import Box
from slicecast.convert.codecs.awq import Awq
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.bitsandbytes import BitsAndBytes4Bit
from slicecast.convert.codecs.gptq import Gptq
from slicecast.convert.codecs.joined import Joined
from slicecast.convert.errors import ReadError, first_line
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
from slicecast.convert.verification import definition

Array = np.ndarray

# The smallest normal float32 and bfloat16: 2**-126. Products below it are subnormal, and XLA on CPU and TPU make them
# zero.
_SMALLEST_NORMAL = 2.0**-126

# Formats whose tensors `definition.py` reads whole, however few rows are wanted.
READ_WHOLE = (Joined, Gptq, Awq, BitsAndBytes4Bit)

# What a comparison holds at most, measured where all values differ (`test_verify_strengths.py`): copies of the region,
# and for each value of the tensor that is decoded at the time, and each byte of its scales, the results on the way.
_COPIES_OF_A_REGION = 6
_BYTES_PER_VALUE = 32
_BYTES_PER_PLAIN_VALUE = 16
_BYTES_PER_PARTNER_BYTE = 8

# What TensorStore says where storage may answer when it is asked again.
_FAILURES_OF_STORAGE = ("ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")

# While some wait for storage, others compute; and more than this, Python would not keep busy.
_AT_ONCE_PER_PROCESSOR = 4
_MAX_AT_ONCE = 32


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
    """Missing and surplus leaves, and leaves of another shape or dtype than the plan says."""
    return differing_trees({each.leaf.path: (each.leaf.dtype, each.leaf.shape) for each in plan.leaves}, arrays)


def differing_trees(
    expected: Mapping[str, tuple[str, Sequence[int]]], arrays: Mapping[str, ts.TensorStore]
) -> list[Difference]:
    """Missing and surplus leaves, and leaves of another dtype and shape than is expected at their path."""
    wrong = [Difference(path, "is missing") for path in expected if path not in arrays]
    wrong += [Difference(path, "is not expected") for path in arrays if path not in expected]
    for path, (dtype, shape) in expected.items():
        array = arrays.get(path)
        if array is not None and (array.dtype.name, list(array.shape)) != (dtype, list(shape)):
            found = f"{array.dtype.name}{list(array.shape)}"
            wrong.append(Difference(path, f"is {found}, expected {dtype}{list(shape)}"))
    return wrong


@dataclass(frozen=True, slots=True)
class Region:
    """A region of a leaf that is compared at once.

    Attributes:
        leaf: The leaf.
        box: What is compared.
        rows: The box, with those axes whole that cut the source's rows: what is recomputed.
    """

    leaf: PlannedLeaf
    box: Box
    rows: Box

    @classmethod
    def of(cls, work: WorkBox) -> "Region":
        """The region of a box that the planner made, which holds whole rows."""
        return cls(work.leaf, work.box, work.box)

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint that are compared, before compression."""
        return self.box.size * self.leaf.itemsize

    @property
    def memory_bytes(self) -> int:
        """The most that its comparison holds in memory."""
        start, stop = self.leaf.rows(self.rows)
        tensors = self.leaf.tensors(self.rows)
        decoded = max(
            (_decoding_bytes(tensor, start, stop, self.leaf.leaf.rule.shape) for tensor in tensors), default=0
        )
        return _COPIES_OF_A_REGION * self.rows.size * self.leaf.itemsize + decoded


def _decoding_bytes(tensor: StoredTensor, start: int, stop: int, shape: tuple[int, ...]) -> int:
    """The most that `definition.rows` holds in memory."""
    whole = isinstance(tensor.codec, READ_WHOLE)
    rows = shape[0] if isinstance(tensor.codec, Joined) else stop - start
    partners = tensor.parts if whole else tensor.parts[1:]
    per_value = _BYTES_PER_VALUE if tensor.codec.changes_values else _BYTES_PER_PLAIN_VALUE
    return per_value * rows * math.prod(shape[1:]) + _BYTES_PER_PARTNER_BYTE * sum(p.tensor.nbytes for p in partners)


@dataclass(frozen=True)
class Mismatch:
    """A region that is not what the source gives.

    Attributes:
        path: The leaf.
        count: How many values differ; 0 if they cannot be read.
        detail: The first that differs, or why they cannot be read.
    """

    path: str
    count: int
    detail: str


def compare_values(
    plan: Plan,
    arrays: Mapping[str, ts.TensorStore],
    regions: Sequence[Region],
    report: Callable[[int], None],
    budget_bytes: int,
) -> list[Mismatch]:
    """Compares regions with the source.

    Args:
        plan: The plan that the checkpoint was made by.
        arrays: The checkpoint's arrays, of the expected shapes and dtypes.
        regions: What is compared.
        report: Called with the number of bytes compared, after each region.
        budget_bytes: Memory to use; a single region may need more.

    Returns:
        The regions that differ, in their order.
    """

    def check(region: Region) -> Mismatch | None:
        path = region.leaf.leaf.path
        try:
            found = read_stored(arrays[path], region.box)
        except DamagedError as error:
            return Mismatch(path, 0, str(error))
        expected = _expected(plan, region.leaf, region.rows)[_inside(region.box, region.rows)]
        count, example = _difference(found, expected, region)
        report(region.nbytes)
        return Mismatch(path, count, example) if count else None

    at_once = workers((region.memory_bytes for region in regions), budget_bytes)
    with ThreadPoolExecutor(at_once, thread_name_prefix="slicecast-verify") as pool:
        return [mismatch for mismatch in pool.map(check, regions) if mismatch is not None]


class DamagedError(Exception):
    """Stored values that fail their checksum, or cannot be decoded."""


def read_stored(array: ts.TensorStore, box: Box) -> Array:
    """The stored values of a region.

    Raises:
        DamagedError: If they are damaged.
        ReadError: If storage fails.
    """
    try:
        values: Array = array[box.slices].read().result()
    except ValueError as error:  # TensorStore's error for all that may be wrong; its first word says what.
        cause = first_line(error)
        if cause.startswith(_FAILURES_OF_STORAGE):
            raise ReadError(f"the checkpoint cannot be read: {cause}. Run the same command again.") from error
        raise DamagedError(f"cannot be read: {cause}") from error
    return values


def workers(memory_bytes: Iterable[int], budget_bytes: int) -> int:
    """How many pieces of work are done at once, so that as many of the largest of them fit the budget."""
    most = min(_MAX_AT_ONCE, _AT_ONCE_PER_PROCESSOR * (os.cpu_count() or 1))
    return max(1, min(most, budget_bytes // max(memory_bytes, default=1)))


def differences(mismatches: Iterable[Mismatch]) -> list[Difference]:
    """The leaves with mismatches, by path, each with the first of them."""
    of_leaf: dict[str, list[Mismatch]] = {}
    for mismatch in mismatches:
        of_leaf.setdefault(mismatch.path, []).append(mismatch)
    return [
        Difference(path, f"{count} values differ; {found[0].detail}" if found[0].count else found[0].detail)
        for path, found in sorted(of_leaf.items())
        for count in [sum(mismatch.count for mismatch in found)]
    ]


def _inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """A box as an index into an array that holds a box around it."""
    ranges = zip(box.start, box.stop, outer.start, strict=True)
    return tuple(slice(start - first, stop - first) for start, stop, first in ranges)


def _difference(found: Array, expected: Array, region: Region) -> tuple[int, str]:
    """How many values differ, and a sentence about the first."""
    bits = np.dtype(f"u{found.dtype.itemsize}")
    unequal = found.view(bits) != np.ascontiguousarray(expected).view(bits)
    if not unequal.any():
        return 0, ""
    mine, theirs = found[unequal], expected[unequal]
    with np.errstate(invalid="ignore"):  # NaNs are compared too.
        same = np.isnan(mine) & np.isnan(theirs)
        if _computes(region):
            same |= (mine == 0) & (np.abs(theirs) < _SMALLEST_NORMAL) & (np.signbit(mine) == np.signbit(theirs))
    unequal[unequal] = ~same
    count = int(np.count_nonzero(unequal))
    if not count:
        return 0, ""
    first = np.unravel_index(np.argmax(unequal), unequal.shape)
    where = [int(index) + start for index, start in zip(first, region.box.start, strict=True)]
    return count, f"the first is at {where}: {float(found[first])!r}, expected {float(expected[first])!r}"


def _computes(region: Region) -> bool:
    """Whether the values of a region were computed or converted, not only moved."""
    leaf = region.leaf.leaf
    return any(isinstance(op, Computing) for op in leaf.rule.ops) or any(
        tensor.codec.changes_values or tensor.parts[0].dtype.name != leaf.dtype
        for tensor in region.leaf.tensors(region.box)
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
