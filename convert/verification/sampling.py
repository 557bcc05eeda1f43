"""Chooses the regions of a checkpoint that `verify --sample` compares with the source.

A leaf is a grid of cells: one layer and one expert, a few of the source's rows, and as many of their columns as a
reader of the checkpoint gets at once. In the order of layers, experts, rows and columns the cells are dealt into as
many equal runs as regions are wanted, and one cell of each run is taken at random. So what is read grows with the
number of regions, not with the leaf; a leaf with few cells is compared whole; and a mistake that fills a run is always
met, whichever cells are drawn.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from slicecast.convert.box import Box
from slicecast.convert.plan import Plan, PlannedLeaf
from slicecast.convert.verification.against_source import Region

# Regions of a leaf. An unbroken sixteenth of it, wherever it begins, holds one of these runs, so what one host of 16
# does wrong is met. A region takes about 1 MB of the source and as much of the checkpoint: of an unscanned model of
# 2 TB, with a thousand leaves, 40 GB are read.
DEFAULT_REGIONS = 32

# The source's rows of a region hold about this much: as much as storage sends in the time that a request takes.
_ROWS_BYTES = 1 << 20


def draw(plan: Plan, count: int, seed: int) -> list[Region]:
    """Regions of every leaf.

    Args:
        plan: The plan that the checkpoint was made by.
        count: How many of a leaf; fewer if it has fewer cells.
        seed: What they are drawn from: the same gives the same regions.
    """
    random = np.random.default_rng(seed)
    return [region for leaf in plan.leaves for region in _draw_from(leaf, count, random)]


def _draw_from(planned: PlannedLeaf, count: int, random: np.random.Generator) -> Iterator[Region]:
    shape, row_axis = planned.leaf.shape, planned.tiling.row_axis
    stacked = [axis for axis, _ in planned.leaf.stacked]
    columns = [axis for axis in range(len(shape)) if axis not in stacked and axis != row_axis]
    cell = _cell(planned, stacked, columns)
    order = [*stacked, *([] if row_axis is None else [row_axis]), *columns]
    grid = [-(-shape[axis] // cell[axis]) for axis in order]
    cells = math.prod(grid)
    runs = min(count, cells)
    for run in range(runs):
        number = int(random.integers(run * cells // runs, (run + 1) * cells // runs))
        box = _box(shape, cell, dict(zip(order, _unraveled(number, grid), strict=True)))
        rows = box
        for axis in columns:
            rows = rows.with_axis(axis, 0, shape[axis])
        yield Region(planned, box, rows)


def _cell(planned: PlannedLeaf, stacked: Sequence[int], columns: Sequence[int]) -> list[int]:
    """The shape of the cells of a leaf."""
    row_axis = planned.tiling.row_axis
    cell = list(planned.tiling.inner)
    for axis in stacked:
        cell[axis] = 1
    if row_axis is not None:
        row_bytes = planned.itemsize * math.prod(planned.leaf.shape[axis] for axis in columns)
        cell[row_axis] = min(cell[row_axis], max(1, _ROWS_BYTES // row_bytes))
    return cell


def _box(shape: Sequence[int], cell: Sequence[int], place: dict[int, int]) -> Box:
    start = tuple(place[axis] * step for axis, step in enumerate(cell))
    return Box(start, tuple(min(size, low + step) for size, low, step in zip(shape, start, cell, strict=True)))


def _unraveled(number: int, grid: Sequence[int]) -> list[int]:
    """The place in a grid of the cell with this number, in row-major order."""
    place = []
    for size in reversed(grid):
        number, index = divmod(number, size)
        place.append(index)
    return place[::-1]
