"""Chooses how a leaf is cut: into chunks for storage, and along which axis the source can be read in pieces.

A leaf is stored as a grid of chunks; each is written whole, by one process, and is again a grid of inner chunks, the
unit in which a trainer reads. There are three sizes, each of which divides the next:

* A column follows the source. A Hugging Face weight is one run of bytes, `[out, in]` row-major. A part of its rows is
  one run too; a part of its columns is thousands of short ones. So we read whole rows, and all chunks that share rows
  are produced together: a column, which must fit in memory (`COLUMN_BYTES`).
* Inner chunks follow the reader. A chip of MaxText's mesh holds a part of each leaf, its shard. Where inner chunks
  divide shards, no byte is read in vain. They are as large as that allows, for each costs a request.
* A chunk is inner chunks, as many as make it worth a key in a database, or a file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.rules import Join
from slicecast.convert.mapping.target import Leaf
from slicecast.convert.sharding import Sharding, axis_rules

# All chunks that share source rows hold at most this much. It is what the smallest memory budget must fit a few times
# over, and large enough that one read of its source is long. Four Kimi-K2 experts are 112 MiB.
COLUMN_BYTES = 128 << 20

# Chunks have at most this much: one thread compresses a chunk, while others wait.
MAX_CHUNK_BYTES = 16 << 20

# Inner chunks have at most this much: a reader of one row fetches all of it. Orbax's guide asks for 10 MB or so.
MAX_INNER_BYTES = 8 << 20

# Layers of a small leaf (a norm scale) share a column up to this size.
SMALL_BYTES = 4 << 20

# Inner chunks of this size are worth a request: a bucket takes as long to send them as to answer, 20 ms at 50 MB/s a
# connection. For the sake of a mesh they may be smaller, as its `Reader` says.
REQUEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a leaf is cut. Chunks at the far edges may stick out of the leaf.

    Attributes:
        chunk: The shape of a stored chunk: the unit of writing.
        inner: The shape of an inner chunk: the unit of compression and of reading. Divides `chunk`.
        row_axis: The axis of the leaf that follows the rows of the source; None if the source must be read whole.
        column: The shape of all chunks that share source rows: the unit of reading the source. On each axis a multiple
            of `chunk`, or the whole leaf.
    """

    chunk: Shape
    inner: Shape
    row_axis: int | None
    column: Shape


@dataclass(frozen=True, slots=True)
class Reader:
    """A mesh to cut for.

    Attributes:
        mesh: The sizes of its axes.
        pieces: Into how many pieces it may cut what has `REQUEST_BYTES`.
    """

    mesh: Mapping[str, int]
    pieces: int


# What is cut for if no mesh is given, the most important first. What divides the shards of 64 chips divides those of 4
# to 32 too, and the first two together serve all mixed meshes of their sizes. Tensor parallelism is rarer, and would
# multiply the requests of all others, so that it gets only what can be had with larger inner chunks.
DEFAULT_READERS = (Reader({"fsdp": 64}, 4), Reader({"expert": 16}, 4), Reader({"tensor": 4}, 2))

# A mesh that is given may cut this often: its chips would otherwise read bytes in vain, each time that they load.
PIECES_IF_GIVEN = 16


def choose(leaf: Leaf, itemsize: int, sharding: Sharding | None = None) -> Tiling:
    """The tiling of a leaf. Depends on nothing but the arguments, so that all hosts agree.

    Args:
        leaf: The leaf.
        itemsize: The bytes of an element.
        sharding: How those who will read it cut it; None for `DEFAULT_READERS`.
    """
    readers = DEFAULT_READERS if sharding is None else (Reader(sharding.mesh, PIECES_IF_GIVEN),)
    rules = axis_rules() if sharding is None else sharding.rules
    shards = [_shard(leaf, Sharding(reader.mesh, rules)) for reader in readers]

    row_axis = _row_axis(leaf)
    inner = column = _column(leaf, itemsize, row_axis, _common(shards))
    for reader, shard in zip(readers, shards, strict=True):
        inner = _refined(inner, shard, REQUEST_BYTES // reader.pieces // itemsize)
    stacked = {axis for axis, _ in leaf.stacked}
    free = [axis for axis in range(len(inner)) if axis not in stacked]
    inner = _halved(inner, free, MAX_INNER_BYTES // itemsize)
    return Tiling(_grown(inner, column, MAX_CHUNK_BYTES // itemsize), inner, row_axis, column)


def elements_read(leaf: Leaf, tiling: Tiling, sharding: Sharding) -> float:
    """How many elements of a leaf a chip reads, on average: its shard, and the rest of the inner chunks that it meets.

    Chips of one host read what they share once, so that a host reads at most the sum of its chips.
    """
    read = 1.0
    for size, inner, parts in zip(leaf.shape, tiling.inner, sharding.parts(leaf), strict=True):
        shards = [(size * part // parts, size * (part + 1) // parts) for part in range(parts)]
        read *= sum(min(-(-stop // inner) * inner, size) - start // inner * inner for start, stop in shards) / parts
    return read


def _shard(leaf: Leaf, sharding: Sharding) -> Shape:
    """The shape of a chip's part of a leaf, with 0, which every length divides, for axes that are not cut.

    An axis that cannot be cut so often is cut as often as it can be.
    """
    parts = [math.gcd(size, number) for size, number in zip(leaf.shape, sharding.parts(leaf), strict=True)]
    return tuple(size // number if number > 1 else 0 for size, number in zip(leaf.shape, parts, strict=True))


def _common(shapes: Iterable[Shape]) -> Shape:
    """The largest shape that divides all of these."""
    return tuple(math.gcd(*sizes) for sizes in zip(*shapes, strict=True))


def _column(leaf: Leaf, itemsize: int, row_axis: int | None, units: Shape) -> Shape:
    """The part of a leaf that is produced together: some experts, one layer or a few small ones, and some rows."""
    column = list(leaf.shape)
    element_bytes = max(math.prod(leaf.element_shape) * itemsize, 1)
    for axis, stack in leaf.stacked:
        if stack.placeholder == "expert":
            # No more than a shard, so that models of small experts too make enough boxes for all hosts.
            most = min(units[axis] or stack.size, COLUMN_BYTES // element_bytes)
            column[axis] = _piece(stack.size, units[axis], most)
    for axis, stack in leaf.stacked:
        if stack.placeholder == "layer":
            others = math.prod(column[other] for other, _ in leaf.stacked if other != axis)
            column[axis] = _piece(stack.size, units[axis], SMALL_BYTES // (element_bytes * others))
    if row_axis is not None:
        row_bytes = math.prod(column) // max(column[row_axis], 1) * itemsize
        column[row_axis] = _piece(column[row_axis], units[row_axis], COLUMN_BYTES // max(row_bytes, 1))
    return tuple(column)


def _piece(size: int, unit: int, most: int) -> int:
    """A part of an axis, at most `most` (or 1): one that divides units (0: there are none), or that they divide.

    A divisor of the axis if there is one of about that length.
    """
    unit = unit or size
    most = max(1, min(size, most))
    divisors = (number for number in range(most, 0, -1) if size % number == 0)
    divisor = next(number for number in divisors if number % unit == 0 or unit % number == 0)
    if 2 * divisor > most:
        return divisor
    return most - most % unit if most > unit else most


def _refined(tile: Shape, shard: Shape, least: int) -> Shape:
    """A tile cut so that it divides a shard, as far as it keeps at least so many elements."""
    found = list(tile)
    for axis, size in enumerate(tile):
        unit = math.gcd(size, shard[axis])
        others = math.prod(found) // size
        found[axis] = next(
            length
            for length in range(unit, size + 1, unit)
            if size % length == 0 and (length * others >= least or length == size)
        )
    return tuple(found)


def _halved(tile: Shape, axes: Iterable[int], most: int) -> Shape:
    """A tile whose longest even axis is halved until it has at most `most` elements, or none is even."""
    found = list(tile)
    while math.prod(found) > most:
        even = [axis for axis in axes if found[axis] % 2 == 0]
        if not even:
            break
        found[max(even, key=lambda axis: found[axis])] //= 2
    return tuple(found)


def _grown(tile: Shape, column: Shape, most: int) -> Shape:
    """As many tiles of a column as have at most `most` elements together, neighbors on its last axes first."""
    found = list(tile)
    for axis in reversed(range(len(tile))):
        tiles = column[axis] // tile[axis]
        fit = max(most // math.prod(found), 1)
        found[axis] *= next(number for number in range(min(tiles, fit), 0, -1) if tiles % number == 0)
    return tuple(found)


def _row_axis(leaf: Leaf) -> int | None:
    """The leaf axis along which a cut leaves the source's rows whole, found by trying each."""
    if isinstance(leaf.rule.source, Join):
        return None  # Neighbors come from all over the stored tensors.
    source = leaf.rule.shape
    element = leaf.element_shape
    for axis, size in enumerate(element):
        if size < 2:
            continue
        try:
            box = ops.boxes(leaf.rule.ops, Box.whole(element).with_axis(axis, 0, 1), source)[0]
        except ValueError:
            continue
        if box.is_contiguous_in(source) and box.shape[0] < source[0]:
            return leaf.element_axis(axis)
    return None
