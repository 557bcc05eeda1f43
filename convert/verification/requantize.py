"""Quantizes a finished checkpoint again, and compares codes and scales with the source.

INT4 releases that come from quantization-aware training are fixed points of their quantizer: it was part of the model
while it was trained, so every group of weights is its scale times whole numbers from -7 to 7, one of which is 7 or -7.
Hence the result alone gives the source back:

    scale = max |w| / 7, rounded to the dtype of scales          code = round(w / scale)

If the result is bfloat16, `7 * scale` was rounded when it was written, and `max |w| / 7` may round to a neighbor of the
scale. The scale is then the one of the neighbors that gives all values of the group. Where two of them do, the result
cannot tell them apart; those groups are counted.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts

from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import Computing
from slicecast.convert.plan import Plan, PlannedLeaf, WorkBox
from slicecast.convert.source.storage import Storage
from slicecast.convert.verification import against_source, definition
from slicecast.convert.verification.against_source import Difference

Array: TypeAlias = np.ndarray[Any, Any]

# The largest code of symmetric INT4 as it is trained: -8, for which there is no 8, stays unused.
LARGEST_CODE = 7


@dataclass(frozen=True)
class Requantized:
    """What quantizing again gave.

    Attributes:
        leaves: Leaves that were quantized again.
        groups: Groups of weights in them.
        ambiguous: Groups whose scale and a neighbor of it give the same values.
        differences: Leaves whose codes or scales are not the source's.
    """

    leaves: int
    groups: int
    ambiguous: int
    differences: tuple[Difference, ...]


def quantize(values: Array, scale_dtype: np.dtype) -> tuple[Array, Array]:
    """Quantizes groups of weights to INT4.

    Args:
        values: bfloat16 or float32 `[groups, group size]`: products of a scale and whole numbers, rounded.
        scale_dtype: The dtype of scales.

    Returns:
        The codes, int8 `[groups, group size]`, and the scales, `scale_dtype[groups]`. Where nothing but zeros is in a
        group, its scale is zero.
    """
    exact = values.astype(np.float64)
    nearest = (np.abs(exact).max(axis=1) / LARGEST_CODE).astype(scale_dtype)
    steps = np.where(nearest == 0, 1, nearest.astype(np.float64))
    codes = np.rint(exact / steps[:, np.newaxis]).astype(np.int8)
    scale = nearest.copy()
    found = _gives(codes, nearest, values)
    for candidate in (_neighbor(nearest, -1), _neighbor(nearest, 1)):
        better = ~found & _gives(codes, candidate, values)
        scale[better] = candidate[better]
        found |= better
    return codes, scale


def compare(plan: Plan, arrays: Mapping[str, ts.TensorStore], workers: int) -> Requantized:
    """Quantizes the leaves of a checkpoint that were INT4 again, and compares them with the source.

    Args:
        plan: The plan that the checkpoint was made by.
        arrays: The checkpoint's arrays, of the expected shapes and dtypes.
        workers: How many boxes are compared at once.
    """
    leaves = [leaf for leaf in plan.leaves if _applies(leaf)]
    paths = {leaf.leaf.path for leaf in leaves}
    boxes = [work for work in plan.boxes if work.leaf.leaf.path in paths]
    groups = ambiguous = 0
    wrong: dict[str, str] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="slicecast-requantize") as pool:
        for work, found in zip(boxes, pool.map(lambda work: _compare_box(plan, arrays, work), boxes), strict=True):
            groups += found[0]
            ambiguous += found[1]
            if found[2]:
                wrong.setdefault(work.leaf.leaf.path, found[2])
    differences = tuple(Difference(path, detail) for path, detail in sorted(wrong.items()))
    return Requantized(len(leaves), groups, ambiguous, differences)


def _applies(planned: PlannedLeaf) -> bool:
    """Whether a leaf's sources are symmetric INT4, and only moved."""
    if any(isinstance(op, Computing) for op in planned.leaf.rule.ops):
        return False
    return all(
        isinstance(codec := tensor.codec, Grouped) and codec.code == "int4_offset" and codec.zero is None
        for tensor in planned.sources.values()
    )


def _compare_box(plan: Plan, arrays: Mapping[str, ts.TensorStore], work: WorkBox) -> tuple[int, int, str]:
    """Groups, ambiguous groups, and a sentence about the first group that differs, if one does."""
    planned, leaf = work.leaf, work.leaf.leaf
    values = arrays[leaf.path][work.box.slices].read().result()
    element = leaf.element_box(work.box)
    start, stop = against_source.source_rows(leaf.rule.ops, leaf.rule.shape, element)
    back = ops.invert(leaf.rule.ops, leaf.rule.shape)
    groups = ambiguous = 0
    for coordinate in leaf.coordinates(work.box):
        tensor = planned.sources[coordinate]
        rows = against_source.layout(back, values[leaf.element_index(work.box, coordinate)].reshape(element.shape))
        of_tensor, alike, problem = _compare_rows(plan.checkpoint.storage, tensor, rows, start, stop)
        groups, ambiguous = groups + of_tensor, ambiguous + alike
        if problem:
            return groups, ambiguous, problem
    return groups, ambiguous, ""


def _compare_rows(storage: Storage, tensor: StoredTensor, rows: Array, start: int, stop: int) -> tuple[int, int, str]:
    codes, scale = definition.int4_codes_and_scales(storage, tensor, start, stop)
    group_size = codes.shape[1] // scale.shape[1]
    grouped = np.ascontiguousarray(rows).reshape(-1, group_size)
    wanted_codes, wanted_scale = codes.reshape(-1, group_size), scale.reshape(-1)
    found_codes, found_scale = quantize(grouped, scale.dtype)
    zeros = ~wanted_codes.any(axis=1)
    wrong_codes = (found_codes != wanted_codes).any(axis=1)
    other_scale = (found_scale != wanted_scale) & ~zeros
    alike = other_scale & _gives(wanted_codes, wanted_scale, grouped)
    wrong = wrong_codes | (other_scale & ~alike)
    if not wrong.any():
        return len(grouped), int(np.count_nonzero(alike)), ""
    first = int(np.flatnonzero(wrong)[0])
    largest = int(np.abs(wanted_codes[first].astype(np.int16)).max())
    trained = largest == LARGEST_CODE
    why = "" if trained else f"; its largest code is {largest}, so it was not trained for this quantizer"
    row, group = divmod(first, scale.shape[1])
    problem = (
        f"is no fixed point of its quantizer: {np.count_nonzero(wrong)} of {len(grouped)} groups of '{tensor.name}' "
        f"differ; the first is group {group} of row {start + row}: codes {found_codes[first].tolist()} and scale "
        f"{float(found_scale[first])!r}, in the source {wanted_codes[first].tolist()} and "
        f"{float(wanted_scale[first])!r}{why}"
    )
    return len(grouped), int(np.count_nonzero(alike)), problem


def _gives(codes: Array, scale: Array, values: Array) -> Array:
    """Which groups are exactly their codes times their scale, in the dtype of the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = codes.astype(np.float32) * scale.astype(np.float32)[:, np.newaxis]
        same: Array = (products.astype(values.dtype) == values).all(axis=1)
    return same


def _neighbor(scale: Array, step: int) -> Array:
    """The next representable numbers above (1) or below (-1), for numbers that are not negative."""
    bits = scale.view(f"i{scale.dtype.itemsize}")
    moved: Array = bits + np.where(bits + step >= 0, step, 0).astype(bits.dtype)
    return moved.view(scale.dtype)
