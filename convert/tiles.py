"""Chooses how a leaf is cut: into chunks for storage, and along which axis the source can be read in pieces.

A leaf is stored as a grid of chunks; each is written whole, by one process, and is again a grid of inner chunks, the
unit in which a trainer reads. Two things pull at the shape of a chunk:

* The reader. MaxText's fsdp axis cuts leaves along their `embed` axis and its expert axis along the experts, so a chunk
  should be a small part of both; the layers are read one at a time.
* The source. A Hugging Face weight is one run of bytes, `[out, in]` row-major. A part of its rows is one run too; a
  part of its columns is thousands of short ones. So we read whole rows, and all chunks that share rows are produced
  together.

The second bounds memory: all chunks over the same rows must fit in it at once (`COLUMN_BYTES`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.rules import Join
from slicecast.convert.mapping.target import Leaf

# All chunks that share source rows hold at most this much. It is what the smallest memory budget must fit a few times
# over, and large enough that one read of its source is long. Four Kimi-K2 experts are 112 MiB.
COLUMN_BYTES = 128 << 20

# The embed axis is cut into this many chunks: fsdp up to 16 then reads whole chunks.
EMBED_CHUNKS = 16

# ... and each of those into this many inner chunks, so that fsdp up to 64 reads no byte in vain.
EMBED_INNER_CHUNKS = 4

# Experts are cut into at least this many chunks: expert parallelism up to 16 reads no byte in vain.
# Where all experts are one source tensor, leaves that are too small for so many chunks (biases) have fewer.
EXPERT_CHUNKS = 16

# Chunks below this are not worth a key and a compressed frame of their own.
MIN_CHUNK_BYTES = 1 << 20

# Chunks above this keep one thread compressing while others wait, and inner chunks above theirs make a reader of one
# row fetch much that it throws away. Orbax's guide asks for 10 MB or so where the reader is not known.
MAX_CHUNK_BYTES = 32 << 20
MAX_INNER_BYTES = 8 << 20

# Layers of a small leaf (a norm scale) share a chunk up to this size.
SMALL_BYTES = 4 << 20


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


def choose(leaf: Leaf, itemsize: int) -> Tiling:
    """The tiling of a leaf whose elements take `itemsize` bytes. Depends on nothing else, so that all hosts agree."""
    shape = leaf.shape
    stacked = {axis for axis, _ in leaf.stacked}
    row_axis, expert, embed = _row_axis(leaf), _expert_axis(leaf), _embed_axis(leaf)
    element_bytes = max(math.prod(leaf.element_shape) * itemsize, 1)

    chunk = list(shape)
    for axis, stack in leaf.stacked:
        if stack.placeholder == "expert":
            chunk[axis] = _cut(stack.size, min(COLUMN_BYTES // element_bytes, stack.size // EXPERT_CHUNKS))
    for axis, stack in leaf.stacked:
        if stack.placeholder == "layer":
            experts = math.prod(chunk[other] for other in stacked if other != axis)
            chunk[axis] = _cut(stack.size, SMALL_BYTES // (element_bytes * experts))
    column_bytes = math.prod(chunk) * itemsize
    if row_axis is not None and column_bytes > COLUMN_BYTES:
        chunk[row_axis] = _cut(shape[row_axis], chunk[row_axis] * COLUMN_BYTES // column_bytes)
    for cut, chunks in ((expert, EXPERT_CHUNKS), (embed, EMBED_CHUNKS)):
        if cut is not None:
            parts = max(1, min(chunks, math.prod(chunk) * itemsize // MIN_CHUNK_BYTES))
            chunk[cut] = min(chunk[cut], _cut(shape[cut], shape[cut] // parts))
    free = [axis for axis in range(len(shape)) if axis not in stacked]
    _shrink(chunk, free, MAX_CHUNK_BYTES // itemsize)

    inner = list(chunk)
    if embed is not None:
        parts = max(1, min(EMBED_INNER_CHUNKS, math.prod(chunk) * itemsize // MIN_CHUNK_BYTES))
        inner[embed] //= next(divisor for divisor in range(parts, 0, -1) if chunk[embed] % divisor == 0)
    _shrink(inner, free, MAX_INNER_BYTES // itemsize)

    column = [chunk[axis] if axis in stacked or axis == row_axis else shape[axis] for axis in range(len(shape))]
    return Tiling(tuple(chunk), tuple(inner), row_axis, tuple(column))


def _cut(size: int, most: int) -> int:
    """A part of an axis, at most `most` (or 1): a divisor of the axis if there is one of about that length."""
    most = max(1, min(size, most))
    divisor = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return divisor if 2 * divisor > most else most


def _shrink(tile: list[int], axes: Sequence[int], most: int) -> None:
    """Halves the longest even axis of a tile, in place, until it has at most `most` elements or none is even."""
    while math.prod(tile) > most:
        even = [axis for axis in axes if tile[axis] % 2 == 0]
        if not even:
            return
        longest = max(even, key=lambda axis: tile[axis])
        tile[longest] //= 2


def _expert_axis(leaf: Leaf) -> int | None:
    """The axis that MaxText's expert parallelism cuts, where it is an axis of the source and no stack."""
    stacked = {axis for axis, _ in leaf.stacked}
    return next((axis for axis, name in enumerate(leaf.axes) if name == "exp" and axis not in stacked), None)


def _embed_axis(leaf: Leaf) -> int | None:
    """The axis that MaxText's fsdp cuts."""
    return next((axis for axis, name in enumerate(leaf.axes) if name is not None and name.startswith("embed")), None)


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
