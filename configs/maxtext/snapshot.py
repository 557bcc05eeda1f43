"""The file of one model of one MaxText release: the leaves of its parameter tree, in each layout.

A file is a JSON object. `scanned` and `unscanned` are the model without encoders of images and audio. The leaves of
`multimodal_scanned` and `multimodal_unscanned` come on top if MaxText has such encoders for the model, and those of
`mtp_scanned` and `mtp_unscanned` if it is published with a layer for multi-token prediction. `use_multimodal` is the
model's own setting in MaxText. A layout is a list, one line a leaf or a leaf of many layers:

    ["params/decoder/layers_{}/mlp/wo/kernel", [14336, 4096], ["mlp", "embed"], "0-4,6-10"]

These are the path, which begins with the leaf's collection, the shape, the logical names of the axes (null if MaxText
gives none), and the numbers that stand for `{}`. The same path comes again, with other numbers, for layers of another
kind. A layout that MaxText refuses is `{"refused": REASON}` instead.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

# What MaxText calls a layer of a decoder or an encoder. Folding other numbers too, as those of `wi_0` and `wi_1`, would
# make files that cannot be searched for them.
_LAYER = re.compile(r"\b((?:dense_|moe_)?layers?|blocks|encoderblock)_(\d+)(?=/)")


@dataclass(frozen=True)
class TargetLeaf:
    """A leaf as MaxText has it.

    Attributes:
        path: Its path, keys joined by `/`.
        shape: Its shape.
        axes: The logical names of its axes, as MaxText gives them: it names fewer than there are for some leaves, and
            none at all (`None`) for others.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None


@dataclass(frozen=True)
class Refusal:
    """Takes the place of the leaves of a layout that MaxText refuses.

    Attributes:
        reason: MaxText's message.
    """

    reason: str


Layout: TypeAlias = tuple[TargetLeaf, ...] | Refusal


@dataclass(frozen=True)
class Snapshot:
    """What a file holds.

    Attributes:
        use_multimodal: Whether MaxText gives the model its encoders of images and audio unless told otherwise.
        layouts: The layouts by the names that they have in the file.
    """

    use_multimodal: bool
    layouts: Mapping[str, Layout]


def dumps(snapshot: Snapshot) -> str:
    """The text of a file."""
    fields = {"use_multimodal": json.dumps(snapshot.use_multimodal)}
    fields |= {name: _dump(layout) for name, layout in snapshot.layouts.items()}
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {value}" for name, value in fields.items()) + "\n}\n"


def loads(text: str) -> Snapshot:
    """The snapshot in the text of a file."""
    fields = json.loads(text)
    use_multimodal = fields.pop("use_multimodal")
    return Snapshot(use_multimodal, {name: _load(layout) for name, layout in fields.items()})


def _dump(layout: Layout) -> str:
    if isinstance(layout, Refusal):
        return json.dumps({"refused": layout.reason})
    return "[\n" + ",\n".join(f"  {json.dumps(line)}" for line in _fold(layout)) + "\n ]"


def _load(layout: Any) -> Layout:
    return Refusal(layout["refused"]) if isinstance(layout, dict) else tuple(_expand(layout))


def _fold(leaves: Iterable[TargetLeaf]) -> Iterator[list[Any]]:
    """The lines of a layout, the same whatever the order of the leaves."""
    numbers_of: dict[TargetLeaf, list[int]] = defaultdict(list)
    for leaf in leaves:
        layer = _LAYER.search(leaf.path)
        numbers = numbers_of[replace(leaf, path=_LAYER.sub(r"\1_{}", leaf.path, count=1))]
        if layer is not None:
            numbers.append(int(layer[2]))
    for leaf, numbers in sorted(numbers_of.items(), key=lambda item: (item[0].path, sorted(item[1]))):
        yield [leaf.path, leaf.shape, leaf.axes, *([_ranges(sorted(numbers))] if numbers else [])]


def _expand(lines: Iterable[list[Any]]) -> Iterator[TargetLeaf]:
    """The leaves in the lines of a layout."""
    for pattern, shape, axes, *ranges in lines:
        paths = [pattern.replace("{}", str(number)) for number in _numbers(*ranges)] if ranges else [pattern]
        for path in paths:
            yield TargetLeaf(path, tuple(shape), None if axes is None else tuple(axes))


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: 0, 1, 2, 5 is `0-2,5`."""
    runs = itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(items) for _, items in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _numbers(ranges: str) -> list[int]:
    """The numbers in ranges: `0-2,5` is 0, 1, 2, 5."""
    ends = [part.split("-") for part in ranges.split(",")]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]
