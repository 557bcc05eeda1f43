"""Boxes against sets of indices."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert.box import Box, Shape, grid_size

thorough = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def boxes(draw: st.DrawFn, max_rank: int = 4, max_size: int = 6) -> tuple[Shape, Box]:
    """A shape and a box of it with at least one element."""
    shape = tuple(draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_rank)))
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    stop = tuple(draw(st.integers(low + 1, size)) for low, size in zip(start, shape, strict=True))
    return shape, Box(start, stop)


def indices(box: Box) -> list[Shape]:
    """The elements of a box, by the definition in its docstring."""
    return list(itertools.product(*(range(low, high) for low, high in zip(box.start, box.stop, strict=True))))


@thorough
@given(boxes())
def test_shape_size_and_slices(case: tuple[Shape, Box]) -> None:
    shape, box = case
    assert box.size == len(indices(box)) == math.prod(box.shape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    assert numbers[box.slices].shape == box.shape
    assert numbers[box.slices].ravel().tolist() == [int(numbers[index]) for index in indices(box)]


def test_scalars_and_empty_boxes() -> None:
    assert Box.whole(()) == Box((), ())
    assert Box.whole(()).size == 1
    assert list(Box.whole(()).tiles(())) == [Box((), ())]
    assert Box((2,), (2,)).size == 0
    assert grid_size((), ()) == 1


def test_whole_covers_the_shape() -> None:
    assert Box.whole((3, 1, 4)) == Box((0, 0, 0), (3, 1, 4))
    assert Box.whole((3, 1, 4)).shape == (3, 1, 4)


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_with_axis_changes_one_axis(axis: int) -> None:
    box = Box((0, 1, 2), (5, 6, 7)).with_axis(axis, 3, 4)
    for other in range(3):
        assert (box.start[other], box.stop[other]) == ((3, 4) if other == axis % 3 else (other, other + 5))


@thorough
@given(boxes())
def test_contiguous_boxes_are_one_run_of_memory(case: tuple[Shape, Box]) -> None:
    shape, box = case
    offsets = [int(np.ravel_multi_index(index, shape)) for index in indices(box)]
    is_run = offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    only_first_axis_cut = Box.whole(shape).with_axis(0, box.start[0], box.stop[0]) == box
    assert box.is_contiguous_in(shape) == only_first_axis_cut
    assert is_run or not box.is_contiguous_in(shape)
    if box.shape[0] > 1:
        assert is_run == box.is_contiguous_in(shape)


@thorough
@given(boxes(), st.data())
def test_tiles_partition_a_box_along_the_grid(case: tuple[Shape, Box], data: st.DataObject) -> None:
    shape, box = case
    tile = tuple(data.draw(st.integers(1, 8)) for _ in shape)
    tiles = list(box.tiles(tile))
    covered = [index for part in tiles for index in indices(part)]
    assert sorted(covered) == indices(box)
    cells = []
    for part in tiles:
        (cell,) = {tuple(i // step for i, step in zip(index, tile, strict=True)) for index in indices(part)}
        cells.append(cell)
    assert cells == sorted(set(cells))


@thorough
@given(boxes(), st.data())
def test_grid_size_counts_the_tiles_of_the_whole(case: tuple[Shape, Box], data: st.DataObject) -> None:
    shape, _ = case
    tile = tuple(data.draw(st.integers(1, 8)) for _ in shape)
    assert grid_size(shape, tile) == len(list(Box.whole(shape).tiles(tile)))


def test_mismatched_ranks_are_an_error() -> None:
    with pytest.raises(ValueError):
        grid_size((1, 2), (1,))
    with pytest.raises(ValueError):
        list(Box.whole((1, 2)).tiles((1,)))
