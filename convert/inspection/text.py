"""Names as people read them: alike ones folded into one line, and nothing that a terminal would obey."""

import itertools
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A number that is a part of a name by itself: of a layer, an expert. At most eight digits, for a hostile name may have
# thousands, and none in front that would be lost.
_NUMBER = re.compile(r"(?<![^._/])(0|[1-9]\d{0,7})(?![^._/])")

# The widest column; what is longer moves the rest of its line, and of no other.
_WIDEST = 100


@dataclass(frozen=True, slots=True)
class Folded:
    """Names that differ in numbers only.

    Attributes:
        name: All of them in one, for example `model.layers.{1-60}.mlp.experts.{0-383}.up_proj.weight`.
        members: The names.
    """

    name: str
    members: tuple[str, ...]


def printable(text: str) -> str:
    """The text with escapes in place of what a terminal would obey, or not show: names come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(_NUMBER.split(name))]


def fold(names: Mapping[str, Hashable]) -> list[Folded]:
    """Folds the names that are alike, in natural order.

    Args:
        names: What each name stands for; only names that stand for the same are folded.
    """
    alike: dict[tuple[Hashable, ...], dict[tuple[int, ...], str]] = {}
    for name in sorted(names, key=natural_order):
        parts = _NUMBER.split(name)
        alike.setdefault((*parts[::2], names[name]), {})[tuple(map(int, parts[1::2]))] = name
    folded = []
    for (*texts, _), members in alike.items():
        for grid in _grids(members):
            ranges = [*map(_ranges, grid), ""]
            name = "".join(f"{text}{numbers}" for text, numbers in zip(texts, ranges, strict=True))
            folded.append(Folded(name, tuple(members[point] for point in itertools.product(*grid))))
    return sorted(folded, key=lambda line: natural_order(line.members[0]))


def _grids(points: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """The points as grids: each is the product of its numbers along each axis."""
    grids: list[tuple[tuple[int, ...], ...]] = [tuple((number,) for number in point) for point in points]
    for axis in reversed(range(len(grids[0]))):
        merged: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for grid in grids:
            merged.setdefault((*grid[:axis], *grid[axis + 1 :]), []).extend(grid[axis])
        grids = [(*rest[:axis], tuple(sorted(numbers)), *rest[axis:]) for rest, numbers in merged.items()]
    return grids


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges, for example `{0-3,5}`; one alone as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"{{{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}}}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell, within reason."""
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def flat(content: Any, name: str = "") -> dict[str, str]:
    """The values of nested JSON objects, each as JSON, by the keys that lead to it, joined by dots."""
    if not isinstance(content, Mapping) or not content:
        return {name: json.dumps(content, ensure_ascii=False)}
    return {
        path: value
        for key, child in content.items()
        for path, value in flat(child, f"{name}.{key}" if name else str(key)).items()
    }
