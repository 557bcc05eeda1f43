"""Compares a finished checkpoint with the digests in its summary (`summary.py`); the source is not needed.

Every chunk is read, by one process. Processes have runs of chunks of about equal bytes, and together the digests of all
chunks give those of the leaves.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash
from etils import epath

from slicecast.convert.box import Box, grid_size
from slicecast.convert.chunk_store import ArraySpec, ChunkFormat, digest, files, missing_keys
from slicecast.convert.errors import first_line
from slicecast.convert.summary import file_digest
from slicecast.convert.verification.against_source import (
    DamagedError,
    Difference,
    differing_trees,
    read_stored,
    workers,
)

# A chunk is held compressed, decoded and, where it sticks out of its leaf, once more.
_COPIES_OF_A_CHUNK = 3


@dataclass(frozen=True)
class Chunk:
    """A chunk of a leaf."""

    path: str
    box: Box
    nbytes: int


@dataclass(frozen=True)
class Digested:
    """What a process has read of a leaf.

    Attributes:
        digests: The digests of its chunks one after another, as hexadecimal digits.
        error: Why a chunk cannot be read; "" if all can.
    """

    digests: str = ""
    error: str = ""


def stored_spec(path: str, array: ts.TensorStore) -> ArraySpec:
    """How an array is stored."""
    chunk = tuple(size or 0 for size in array.chunk_layout.write_chunk.shape or ())
    return ArraySpec(path.replace("/", "."), tuple(array.shape), array.dtype.name, chunk, chunk)


def compare_files(step: epath.Path, digests: Mapping[str, str]) -> list[Difference]:
    """Files of a checkpoint that are missing, or not as they were.

    Args:
        step: The checkpoint.
        digests: What the summary says of its files.
    """
    store = files(step)
    reads = {name: store.read(name) for name in digests}
    wrong = []
    for name, read in reads.items():
        try:
            found = read.result()
        except ValueError as error:  # TensorStore's error for a name that cannot be read, such as a directory's.
            wrong.append(Difference(f"{step.name}/{name}", f"cannot be read: {first_line(error)}"))
            continue
        if found.state != "value":
            wrong.append(Difference(f"{step.name}/{name}", "is missing"))
        elif file_digest(found.value) != digests[name]:
            wrong.append(Difference(f"{step.name}/{name}", "is not as it was written"))
    return wrong


def compare_trees(leaves: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, ts.TensorStore]) -> list[Difference]:
    """Missing and surplus leaves, and leaves of another shape or dtype than the summary says."""
    return differing_trees({path: (leaf["dtype"], leaf["shape"]) for path, leaf in leaves.items()}, arrays)


def missing_chunks(
    item: epath.Path, chunk_format: ChunkFormat, arrays: Mapping[str, ts.TensorStore]
) -> list[Difference]:
    """Leaves of which chunks are not there. TensorStore, and so every loader, reads those as zeros."""
    specs = {path: stored_spec(path, array) for path, array in arrays.items()}
    try:
        keys = missing_keys(item, specs.values(), chunk_format)
    except ValueError as error:
        return [Difference(item.name, f"cannot be listed: {first_line(error)}")]
    of_leaf: dict[str, list[str]] = {}
    for key in keys:
        of_leaf.setdefault(key.partition("/")[0], []).append(key)
    return [
        Difference(path, f"{len(of_leaf[spec.name])} chunks are missing, among them {of_leaf[spec.name][0]}")
        for path, spec in specs.items()
        if spec.name in of_leaf
    ]


def share(arrays: Mapping[str, ts.TensorStore], process: int, processes: int) -> Iterator[Chunk]:
    """The chunks that a process reads, in order."""
    specs = {path: stored_spec(path, array) for path, array in sorted(arrays.items())}
    total = sum(_nbytes(spec, spec.shape) for spec in specs.values())
    before = 0
    for path, spec in specs.items():
        nbytes, count = _nbytes(spec, spec.shape), grid_size(spec.shape, spec.chunk)
        for number, box in enumerate(Box.whole(spec.shape).tiles(spec.chunk)):
            position = before + number * nbytes // count
            if position * processes // max(total, 1) == process:
                yield Chunk(path, box, _nbytes(spec, box.shape))
        before += nbytes


def _nbytes(spec: ArraySpec, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(spec.dtype).itemsize


def compute(
    arrays: Mapping[str, ts.TensorStore],
    chunks: Sequence[Chunk],
    report: Callable[[int], None],
    budget_bytes: int,
) -> dict[str, Digested]:
    """Reads chunks, and computes their digests.

    Args:
        arrays: The checkpoint's arrays.
        chunks: What is read.
        report: Called with the number of bytes read, after each chunk.
        budget_bytes: Memory to use.

    Returns:
        What was found, by leaf.
    """

    def read(chunk: Chunk) -> Digested:
        try:
            found = digest(read_stored(arrays[chunk.path], chunk.box))
        except DamagedError as error:
            return Digested(error=str(error))
        report(chunk.nbytes)
        return Digested(found)

    at_once = workers((_COPIES_OF_A_CHUNK * chunk.nbytes for chunk in chunks), budget_bytes)
    of_leaf: dict[str, list[Digested]] = {}
    with ThreadPoolExecutor(at_once, thread_name_prefix="slicecast-digest") as pool:
        for chunk, found in zip(chunks, pool.map(read, chunks), strict=True):
            of_leaf.setdefault(chunk.path, []).append(found)
    return {path: _joined(found) for path, found in of_leaf.items()}


def _joined(found: Sequence[Digested]) -> Digested:
    """What neighboring parts of a leaf are together."""
    return Digested("".join(part.digests for part in found), next((part.error for part in found if part.error), ""))


def compare(leaves: Mapping[str, Mapping[str, Any]], processes: Sequence[Mapping[str, Digested]]) -> list[Difference]:
    """Leaves whose digest is not that in the summary, or that cannot be read.

    Args:
        leaves: What the summary says of the leaves.
        processes: What each process has found, in their order.
    """
    wrong = []
    for path, leaf in leaves.items():
        digested = _joined([found[path] for found in processes if path in found])
        of_leaf = xxhash.xxh3_128_hexdigest(bytes.fromhex(digested.digests))
        if digested.error:
            wrong.append(Difference(path, digested.error))
        elif of_leaf != leaf["digest"]:
            wrong.append(Difference(path, f"has the digest {of_leaf}, expected {leaf['digest']}"))
    return wrong
