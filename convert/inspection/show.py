"""Contents and differences as people read them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.filesize import decimal as size

from slicecast.convert.inspection import checkpoint, source
from slicecast.convert.inspection.checkpoint import CheckpointContents
from slicecast.convert.inspection.contents import Contents
from slicecast.convert.inspection.difference import Comparison, Difference
from slicecast.convert.inspection.source import SourceContents, Total
from slicecast.convert.inspection.text import Folded, columns, flat, fold, natural_order, printable

# Oddities shown; where a shard is missing, thousands of tensors have one.
_ODD_SHOWN = 20


def lines(contents: Contents, *, unfolded: bool) -> Iterator[str]:
    """What a checkpoint holds.

    Args:
        contents: What it holds.
        unfolded: Whether each tensor has a line of its own.
    """
    if isinstance(contents, SourceContents):
        facts, title, rows = _source_facts(contents), "tensors", _source_rows(contents, unfolded=unfolded)
    else:
        facts, title, rows = _checkpoint_facts(contents), "arrays", _checkpoint_rows(contents, unfolded=unfolded)
    for name, text in facts:
        yield printable(f"{name:<12} {text}".rstrip())
    if rows:
        yield title
        yield from (printable(f"  {line}") for line in columns(rows))
    if contents.odd:
        yield f"odd          {_counted(len(contents.odd), 'thing')}"
    for error in contents.odd[:_ODD_SHOWN]:
        yield printable(f"  {type(error).__name__}: {error}")
    if len(contents.odd) > _ODD_SHOWN:
        yield f"  ... and {len(contents.odd) - _ODD_SHOWN} more; --json has all."


def _source_facts(contents: SourceContents) -> Iterator[tuple[str, str]]:
    held = contents.checkpoint
    yield "source", contents.path
    yield "model", contents.model or "not one that slicecast knows"
    if contents.leaves is not None:
        yield "converts", f"to {contents.leaves} leaves"
    else:
        yield "converts", "no, see below"
    for ignored in contents.ignored:
        yield "left out", f"{_counted(ignored.count, 'tensor')}, {size(ignored.nbytes)}: {ignored.why}"
    yield "quantization", contents.quantization.description if contents.quantization else "none announced"
    files, tensors = len(held.file_sizes), len(held.tensors)
    yield "stored", f"{_counted(tensors, 'tensor')} in {_counted(files, 'file')}, {size(held.total_bytes)}"
    yield "parameters", f"{source.parameters(contents):,}"
    yield from _totals("dtypes", source.dtypes(contents), "tensor")
    yield from _totals("formats", source.formats(contents), "weight")


def _source_rows(contents: SourceContents, *, unfolded: bool) -> list[tuple[str, ...]]:
    held, said = contents.checkpoint.tensors, source.notes(contents)
    if unfolded:
        return [
            (
                name,
                f"{held[name].dtype} {list(held[name].shape)}",
                size(held[name].nbytes),
                held[name].file,
                said.get(name, ""),
            )
            for name in sorted(held, key=natural_order)
        ]
    alike = {name: (tensor.dtype, tensor.shape, said.get(name, "")) for name, tensor in held.items()}
    return [
        (line.name, f"{dtype} {list(shape)}", _sizes(line, lambda name: held[name].nbytes), note)
        for line in fold(alike)
        for dtype, shape, note in (alike[line.members[0]],)
    ]


def _checkpoint_facts(contents: CheckpointContents) -> Iterator[tuple[str, str]]:
    arrays = contents.arrays.values()
    yield "checkpoint", contents.path
    yield "finished", "yes" if contents.finished else "no: nothing loads it yet"
    if contents.storage:
        nbytes = sum(array.nbytes for array in arrays)
        digests = sum(array.digest is not None for array in arrays)
        yield "storage", contents.storage
        yield "stored", f"{_counted(len(arrays), 'array')}, {size(nbytes)} before compression"
        yield "values", f"{sum(array.size for array in arrays):,}"
        yield from _totals("dtypes", checkpoint.dtypes(contents), "array")
        yield from _totals("codecs", checkpoint.codecs(contents), "array")
        yield "digests", f"of {_counted(digests, 'array')}" if digests else "none"
    yield from _values("metadata", contents.custom_metadata)
    yield from _values("summary", contents.result)


def _checkpoint_rows(contents: CheckpointContents, *, unfolded: bool) -> list[tuple[str, ...]]:
    arrays = contents.arrays
    # Where all are stored alike, that has been said.
    differ = len(checkpoint.codecs(contents)) > 1
    kinds: dict[str, tuple[str, ...]] = {
        path: (
            f"{array.dtype} {list(array.shape)}",
            f"chunks {array.chunk}",
            "" if array.inner is None else f"inner {array.inner}",
            *((array.codecs,) if differ else ()),
            *((size(array.nbytes), array.digest or "") if unfolded else ()),
        )
        for path, array in arrays.items()
    }
    kinds |= {path: (kind, *[""] * (2 + differ + 2 * unfolded)) for path, kind in contents.others.items()}
    if unfolded:
        return [(path, *kinds[path]) for path in sorted(kinds, key=natural_order)]
    return [
        (
            line.name,
            *kinds[line.members[0]],
            _sizes(line, lambda path: arrays[path].nbytes) if line.members[0] in arrays else "",
        )
        for line in fold(kinds)
    ]


def _values(name: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for each value of nested JSON objects, of which the first has the name."""
    for i, (key, value) in enumerate(flat(content).items() if content else ()):
        yield name if i == 0 else "", f"{key} {value}"


def _totals(name: str, totals: Mapping[str, Total], what: str) -> Iterator[tuple[str, str]]:
    """A line for each total, of which the first has the name."""
    for i, (kind, total) in enumerate(totals.items()):
        yield name if i == 0 else "", f"{kind}: {_counted(total.count, what)}, {size(total.nbytes)}"


def _sizes(line: Folded, nbytes: Callable[[str], int]) -> str:
    """The size of what a line stands for, all of which are of the same size."""
    each = size(nbytes(line.members[0]))
    return each if len(line.members) == 1 else f"{len(line.members)} x {each}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def comparison_lines(comparison: Comparison, *, unfolded: bool) -> Iterator[str]:
    """Every difference, and how far the comparison went."""
    a, b = comparison.a, comparison.b
    yield printable(f"A            {a.path}")
    yield printable(f"B            {b.path}")
    if comparison.differences:
        rows = [("", "", "A", "B"), *_difference_rows(comparison.differences, unfolded=unfolded)]
        yield from (printable(line) for line in columns(rows))
    yield f"differences  {len(comparison.differences) or 'none'}"
    values = (
        "compared by their digests" if comparison.values_compared else "not compared: not both have digests of them"
    )
    yield f"values       {values}"


def _difference_rows(differences: Sequence[Difference], *, unfolded: bool) -> Iterator[tuple[str, ...]]:
    for kind in ("tensor", "leaf", "field"):
        of_name: dict[str, list[tuple[str, ...]]] = {}
        for each in differences:
            if each.kind == kind:
                of_name.setdefault(each.name, []).append((each.what, _or_dash(each.a), _or_dash(each.b)))
        alike = {name: tuple(rows) for name, rows in of_name.items()}
        names = {name: name for name in alike} if unfolded else {line.name: line.members[0] for line in fold(alike)}
        for name, member in names.items():
            yield from ((name, *row) for row in alike[member])


def _or_dash(text: str | None) -> str:
    return "-" if text is None else text
