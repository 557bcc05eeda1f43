"""Names every difference between two checkpoints of the same kind, as far as headers and metadata tell."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from slicecast.convert.errors import UsageError
from slicecast.convert.inspection.checkpoint import CheckpointContents, StoredArray
from slicecast.convert.inspection.contents import Contents
from slicecast.convert.inspection.source import SourceContents, notes
from slicecast.convert.inspection.text import flat, printable
from slicecast.convert.source.checkpoint import CONFIG

# What is said of a tensor, a leaf or a field, by the name of what is said.
Facts = Mapping[str, str]

Kind = Literal["tensor", "leaf", "field"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    Attributes:
        kind: What the name is one of: the tensors, the leaves, or the fields of configs and metadata.
        name: What differs.
        what: In what, for example `dtype`.
        a: What it is in the first checkpoint; None if the first one has nothing of this name.
        b: The same of the second one.
    """

    kind: Kind
    name: str
    what: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints beside each other.

    Attributes:
        a: The first one.
        b: The second one.
        differences: Every difference.
        values_compared: Whether digests tell which values are the same; headers and metadata do not.
    """

    a: Contents
    b: Contents
    differences: tuple[Difference, ...]
    values_compared: bool


def compare(a: Contents, b: Contents) -> Comparison:
    """Compares two sources, or two checkpoints.

    Raises:
        UsageError: If they are not of the same kind, or cannot be read completely.
    """
    for contents in (a, b):
        if not contents.complete:
            causes = "\n".join(printable(str(error)) for error in contents.odd)
            raise UsageError(f"{contents.path}: cannot be compared, because it cannot be read completely:\n{causes}")
    digests = False
    if isinstance(a, SourceContents) and isinstance(b, SourceContents):
        found = [*_compare("tensor", _tensors(a), _tensors(b)), *_compare("field", _configs(a), _configs(b))]
    elif isinstance(a, CheckpointContents) and isinstance(b, CheckpointContents):
        digests = a.has_digests and b.has_digests
        found = [
            *_compare("leaf", _leaves(a, digests=digests), _leaves(b, digests=digests)),
            *_compare("field", _metadata(a), _metadata(b)),
        ]
    else:
        source, output = (a, b) if isinstance(a, SourceContents) else (b, a)
        raise UsageError(
            f"{source.path} is a Hugging Face checkpoint and {output.path} one of Orbax. To compare a result with its "
            "source is what `slicecast verify OUT --hf_model_path=SOURCE` is for."
        )
    return Comparison(a, b, tuple(found), digests)


def _compare(kind: Kind, a: Mapping[str, Facts], b: Mapping[str, Facts]) -> Iterator[Difference]:
    for name in dict.fromkeys([*a, *b]):
        of_a, of_b = a.get(name), b.get(name)
        if of_a is None or of_b is None:
            missing = f"missing in {'A' if of_a is None else 'B'}"
            yield Difference(kind, name, missing, _joined(of_a), _joined(of_b))
            continue
        for what in dict.fromkeys([*of_a, *of_b]):
            if of_a.get(what) != of_b.get(what):
                yield Difference(kind, name, what, of_a.get(what), of_b.get(what))


def _joined(facts: Facts | None) -> str | None:
    """The first facts, which tell what it is."""
    return None if facts is None else " ".join(list(facts.values())[:2])


def _tensors(contents: SourceContents) -> dict[str, Facts]:
    said = notes(contents)
    return {
        name: {"dtype": tensor.dtype, "shape": str(list(tensor.shape)), "format": said.get(name, "")}
        for name, tensor in contents.checkpoint.tensors.items()
    }


def _configs(contents: SourceContents) -> dict[str, Facts]:
    checkpoint = contents.checkpoint
    return _fields({CONFIG: checkpoint.config, **checkpoint.side_configs})


def _leaves(contents: CheckpointContents, *, digests: bool) -> dict[str, Facts]:
    found: dict[str, Facts] = {path: _array(array, digests=digests) for path, array in contents.arrays.items()}
    return found | {path: {"kind": kind} for path, kind in contents.others.items()}


def _array(array: StoredArray, *, digests: bool) -> Facts:
    facts = {
        "dtype": array.dtype,
        "shape": str(list(array.shape)),
        "chunks": str(array.chunk),
        "inner chunks": str(array.inner),
        "codecs": array.codecs,
    }
    facts |= {key: json.dumps(value) for key, value in array.rest.items()}
    return facts | ({"digest": str(array.digest)} if digests else {})


def _metadata(contents: CheckpointContents) -> dict[str, Facts]:
    named = {"custom_metadata": contents.custom_metadata, "summary": contents.result}
    return _fields(
        {
            "finished": contents.finished,
            "storage": contents.storage,
            **{name: fields for name, fields in named.items() if fields},
        }
    )


def _fields(content: Mapping[str, Any]) -> dict[str, Facts]:
    return {name: {"value": value} for name, value in flat(content).items()}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "a": comparison.a.path,
        "b": comparison.b.path,
        "equal": not comparison.differences,
        "values_compared": comparison.values_compared,
        "differences": [asdict(difference) for difference in comparison.differences],
    }
