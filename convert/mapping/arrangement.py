"""How a tensor's axes become a leaf's, written down with the names of the axes.

    "(q_heads kv) embed_attn -> embed_attn q_heads kv"

reads: the stored matrix has `q_heads * kv` rows and `embed_attn` columns; the leaf has three axes, in this order. It is
the notation of einops. Names are MaxText's logical names, which are the leaf's axes too; a table gives their sizes.

    name              an axis
    name:size         an axis of another size than its name's: a size's name, or a number
    :size             an axis for which MaxText has no name
    name~stored       an axis of which the checkpoint has `stored` rows: rows of zeros follow, or the last are left out
    (a b)             one stored axis that holds two, row-major
    (0/2 a), (a 1/2)  the first half of a stored axis; every second element, beginning with the second one
    (2:6/9 a)         elements 2 to 5 of a stored axis of 9

Without an arrow the leaf's axes are the stored ones.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slicecast.convert.box import Shape
from slicecast.convert.mapping.ops import Op, Slice, Split, Stride, Transpose, target_shape

Sizes = Mapping[str, int]

_WORD = re.compile(r"\([^()]*\)|[^\s()]+")
_AXIS = re.compile(r"(?P<name>[a-z_]\w*)?(?::(?P<size>\w+))?(?:~(?P<stored>\w+))?")
_PART = re.compile(r"(?P<index>\d+)/(?P<count>\d+)")
_RANGE = re.compile(r"(?P<start>\d+):(?P<stop>\d+)/(?P<length>\d+)")


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A parsed arrangement.

    Attributes:
        shape: The shape of the source tensor, as the ops take it.
        stored_rows: How many rows the checkpoint has of it, where that is another number.
        ops: What leads from the source to the leaf.
        axes: MaxText's logical names of the leaf's axes.
    """

    shape: Shape
    stored_rows: int | None
    ops: tuple[Op, ...]
    axes: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis: its name and size together tell it from others, so that each stands once on both sides."""

    name: str | None
    label: str
    size: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored axis: the axes that it holds, and what is taken of it."""

    axes: tuple[_Axis, ...]
    length: int
    taken: Op | None = None
    stored_rows: int | None = None


def parse(text: str, sizes: Sizes) -> Arrangement:
    """What an arrangement says, for these sizes.

    Raises:
        ValueError: If it is not written as the module describes, or names a size that is not there.
    """
    try:
        return _parsed(text, sizes)
    except ValueError as error:
        raise ValueError(f"arrangement '{text}': {error}") from None


def _parsed(text: str, sizes: Sizes) -> Arrangement:
    left, arrow, right = text.partition("->")
    if _WORD.sub("", left).strip():
        raise ValueError("parentheses do not match")
    source = [_stored(word, sizes, position) for position, word in enumerate(_WORD.findall(left))]
    groups = [item.axes for item in source]
    axes = {axis.label: axis for group in groups for axis in group}
    wanted = right.split() if arrow else list(axes)
    if not axes or sorted(axes) != sorted(wanted) or len(axes) != sum(map(len, groups)):
        raise ValueError(f"the source's axes {list(axes)} are not the leaf's axes {wanted}, each once")
    target = [axes[label] for label in wanted]
    if any(item.stored_rows is not None for item in source[1:]):
        raise ValueError("only the first axis can have another length in the checkpoint")
    shape = tuple(item.length for item in source)
    ops = tuple(item.taken for item in source if item.taken is not None) + _rearranged(groups, target)
    target_shape(ops, shape)  # Refuses what is taken beyond the end of an axis.
    return Arrangement(shape, source[0].stored_rows, ops, tuple(axis.name for axis in target))


def _rearranged(source: Sequence[tuple[_Axis, ...]], target: Sequence[_Axis]) -> tuple[Op, ...]:
    """The ops from groups of axes to the same axes in another order."""
    # A group that stays together is moved as one axis, so that a matrix is transposed before its rows are taken apart:
    # kernels can give it transposed, and then nothing else is to be done.
    whole = all(_stays_together(group, target) for group in source)
    units: list[tuple[_Axis, ...]] = list(source) if whole else [(axis,) for group in source for axis in group]
    moved = sorted(units, key=lambda unit: target.index(unit[0]))
    transpose = [] if moved == units else [Transpose(tuple(units.index(unit) for unit in moved))]
    return (*transpose, *_splits(moved)) if whole else (*_splits(source), *transpose)


def _stays_together(group: Sequence[_Axis], target: Sequence[_Axis]) -> bool:
    first = target.index(group[0])
    return list(target[first : first + len(group)]) == list(group)


def _splits(groups: Sequence[Sequence[_Axis]]) -> list[Op]:
    """The splits that leave every axis alone; from the last to the first, so that positions stay what they are."""
    return [
        Split(position, tuple(axis.size for axis in group))
        for position, group in reversed(list(enumerate(groups)))
        if len(group) > 1
    ]


def _stored(word: str, sizes: Sizes, position: int) -> _Stored:
    words = word.strip("()").split() or [word]
    block, elements = _PART.fullmatch(words[0]), _RANGE.fullmatch(words[0])
    every = None if block else _PART.fullmatch(words[-1])
    names = words[1:] if block or elements else words[:-1] if every else words
    if not names:
        raise ValueError(f"'{word}' holds no axis")
    if "~" in word and len(words) > 1:
        raise ValueError(f"'{word}': only an axis that stands alone can have another length in the checkpoint")
    axes = tuple(_axis(name, sizes) for name in names)
    length = math.prod(axis.size for axis in axes)
    if block:
        index, count = int(block["index"]), int(block["count"])
        return _Stored(axes, length * count, Slice(position, index * length, (index + 1) * length))
    if elements:
        start, stop = int(elements["start"]), int(elements["stop"])
        if stop - start != length:
            raise ValueError(f"'{word}': the axes have {length} elements, and {stop - start} are taken")
        return _Stored(axes, int(elements["length"]), Slice(position, start, stop))
    if every:
        return _Stored(axes, length * int(every["count"]), Stride(position, int(every["index"]), int(every["count"])))
    _, tilde, stored = names[0].partition("~")
    rows = _size(stored, sizes) if tilde else length
    return _Stored(axes, length, stored_rows=None if rows == length else rows)


def _axis(word: str, sizes: Sizes) -> _Axis:
    match = _AXIS.fullmatch(word)
    if match is None or not (match["name"] or match["size"]):
        raise ValueError(f"'{word}' is no axis")
    name, size = match["name"], match["size"]
    return _Axis(name, f"{name or ''}{f':{size}' if size else ''}", _size(size or name, sizes))


def _size(name: str, sizes: Sizes) -> int:
    if name.isdecimal():
        return int(name)
    if name not in sizes:
        raise ValueError(f"there is no size called '{name}'; there are {', '.join(sorted(sizes))}")
    return sizes[name]
