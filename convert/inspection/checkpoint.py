"""What an Orbax checkpoint holds, whoever wrote it, from its metadata: no chunk is read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tensorstore as ts
from etils import epath

from slicecast.convert import orbax_checkpoint
from slicecast.convert.box import Shape
from slicecast.convert.chunk_store import ChunkFormat
from slicecast.convert.errors import OutputError, SlicecastError
from slicecast.convert.inspection.source import Total, totals
from slicecast.convert.orbax_checkpoint import ITEM, STEP_METADATA_FILE, TREE_METADATA_FILE, StoredTree
from slicecast.convert.output import SUMMARY_FILE

# In the name of what Orbax has not committed yet.
_TEMPORARY = ".orbax-checkpoint-tmp"

# How codecs are configured unless a writer asks for something else.
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_USUAL = {
    "endian": "little",
    "checksum": False,
    "index_location": "end",
    "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
}

# What is shown beside the codecs, or is the name of one.
_SAID_ELSEWHERE = frozenset(("chunk_shape", "id"))


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        itemsize: Bytes of a value.
        metadata: The metadata of the zarr array, as TensorStore gives it.
        digest: The digest of its values, if the checkpoint's summary has one.
    """

    shape: Shape
    dtype: str
    itemsize: int
    metadata: Mapping[str, Any]
    digest: str | None

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes, before compression."""
        return self.size * self.itemsize

    @property
    def chunk(self) -> list[int]:
        """The shape of a chunk: what is one key in storage."""
        if "chunks" in self.metadata:
            return list(self.metadata["chunks"])
        return list(self.metadata["chunk_grid"]["configuration"]["chunk_shape"])

    @property
    def inner(self) -> list[int] | None:
        """The shape of an inner chunk, what is read at least; None where chunks are not divided."""
        configuration = self._sharding
        return None if configuration is None else list(configuration["chunk_shape"])

    @property
    def codecs(self) -> str:
        """What values go through on their way into a chunk, for example `bytes, zstd 1, crc32c`."""
        if "codecs" in self.metadata:
            return _codecs(self.metadata["codecs"])
        steps = [*(self.metadata.get("filters") or ()), self.metadata.get("compressor")]
        return ", ".join(_codec(step["id"], step) for step in steps if step) or "none"

    @property
    def rest(self) -> dict[str, Any]:
        """What the metadata says beside shape, dtype, chunks and codecs."""
        said = ("shape", "dtype", "data_type", "chunks", "chunk_grid", "codecs", "compressor", "filters")
        return {key: value for key, value in self.metadata.items() if key not in said}

    @property
    def _sharding(self) -> Mapping[str, Any] | None:
        for codec in self.metadata.get("codecs", ()):
            if codec["name"] == "sharding_indexed":
                configuration: Mapping[str, Any] = codec["configuration"]
                return configuration
        return None


def _codecs(codecs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(_codec(codec["name"], codec.get("configuration", {})) for codec in codecs)


def _codec(name: str, configuration: Mapping[str, Any]) -> str:
    """A codec with its configuration, but for what TensorStore chooses by itself."""
    options = {key: value for key, value in configuration.items() if _USUAL.get(key) != value}
    words = [name]
    if "level" in options:
        words.append(str(options.pop("level")))
    if "codecs" in options:
        words.append(f"({_codecs(options.pop('codecs'))})")
    words += [f"{key}={json.dumps(value)}" for key, value in options.items() if key not in _SAID_ELSEWHERE]
    return " ".join(words)


@dataclass(frozen=True)
class CheckpointContents:
    """What an Orbax checkpoint holds.

    Attributes:
        path: The directory of the item, or the nearest to one that was found.
        finished: Whether it has been committed.
        storage: How arrays are stored, for example `zarr3 in an OCDBT database`; empty if there is no tree.
        arrays: The arrays, by path in the tree.
        others: What the other leaves are, by path in the tree.
        custom_metadata: What the writer added to the step's metadata.
        summary: What slicecast's summary beside the checkpoint says; empty if there is none.
        odd: Whatever could not be read.
    """

    path: str
    finished: bool
    storage: str
    arrays: Mapping[str, StoredArray]
    others: Mapping[str, str]
    custom_metadata: Mapping[str, Any]
    summary: Mapping[str, Any]
    odd: tuple[SlicecastError, ...]

    @property
    def result(self) -> dict[str, Any]:
        """What the summary says of the result; the rest, such as times and hosts, differs from run to run."""
        said = ("source", "model", "quantization", "plan", "versions")
        return {key: self.summary[key] for key in said if key in self.summary}

    @property
    def complete(self) -> bool:
        """Whether all of it could be read."""
        return not self.odd

    @property
    def has_digests(self) -> bool:
        """Whether the digest of every array is known."""
        return bool(self.arrays) and all(array.digest is not None for array in self.arrays.values())


def is_checkpoint(names: frozenset[str]) -> bool:
    """Whether a directory with these files holds a checkpoint of Orbax, or is a part of one."""
    known = {STEP_METADATA_FILE, TREE_METADATA_FILE, SUMMARY_FILE}
    return not names.isdisjoint(known) or any(name.isdecimal() or _TEMPORARY in name for name in names)


def read_checkpoint(path: epath.Path) -> CheckpointContents:
    """Reads what a checkpoint says of itself.

    Args:
        path: An output directory, a step in it, or an item of that. Of several steps the last one is read.

    Raises:
        OutputError: If there is none, or it cannot be listed.
    """
    odd: list[SlicecastError] = []
    try:
        step, item = _locate(path)
        finished = orbax_checkpoint.is_finished(step) and orbax_checkpoint.is_finished(item)
        custom_metadata = orbax_checkpoint.read_custom_metadata(step)
        summary = {} if step == item else _read_summary(step.parent / SUMMARY_FILE, odd)
        tree = _open_tree(item, odd, finished=finished)
    except OutputError:
        raise
    except Exception as error:  # Each backend of epath has errors of its own.
        raise OutputError(f"{path}: cannot be read: {error}. Check its permissions, or your credentials.") from error
    digests = _digests(summary)
    return CheckpointContents(
        path=str(item),
        finished=finished,
        storage="" if tree is None else _storage(tree.chunk_format),
        arrays={} if tree is None else {at: _stored(store, digests.get(at)) for at, store in tree.arrays.items()},
        others={} if tree is None else tree.others,
        custom_metadata=custom_metadata,
        summary=summary,
        odd=tuple(odd),
    )


def _locate(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The step and its item; the same directory where a program has saved an item without a step."""
    if (path / TREE_METADATA_FILE).exists():
        return (path.parent if (path.parent / STEP_METADATA_FILE).exists() else path), path
    children = {child.name for child in path.iterdir()}
    if STEP_METADATA_FILE not in children:
        steps = sorted((name for name in children if name.isdecimal()), key=int)
        steps = steps or sorted(name for name in children if _TEMPORARY in name and not name.startswith(ITEM))
        if steps:
            return _locate(path / steps[-1])
    # MaxText reads the item of this name; others call theirs `default` or `state`.
    items = sorted(children, key=lambda name: (not name.startswith(ITEM), name))
    for name in items:
        if (path / name / TREE_METADATA_FILE).exists():
            return path, path / name
    if STEP_METADATA_FILE in children or _TEMPORARY in path.name or any(name.startswith(ITEM) for name in children):
        return path, path / items[0] if items and items[0].startswith(ITEM) else path
    raise OutputError(f"{path}: found neither a checkpoint of Orbax nor one of Hugging Face. Check the path.")


def _open_tree(item: epath.Path, odd: list[SlicecastError], *, finished: bool) -> StoredTree | None:
    """The tree of an item, if it can be opened; adds what is wrong with it to `odd`."""
    if not (item / TREE_METADATA_FILE).exists():
        odd.append(OutputError(f"{item}: found no {TREE_METADATA_FILE}, without which no tree is known."))
        return None
    try:
        return orbax_checkpoint.open_tree(item)
    except OutputError as error:
        unfinished = OutputError(f"{item}: its arrays are not known before the checkpoint is finished.")
        odd.append(error if finished else unfinished)
        return None


def _read_summary(file: epath.Path, odd: list[SlicecastError]) -> Mapping[str, Any]:
    """The summary, if there is one; adds what is wrong with it to `odd`."""
    try:
        summary = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:  # Not JSON, or not even text.
        odd.append(OutputError(f"{file}: found text that is not JSON ({error})."))
        return {}
    return summary if isinstance(summary, dict) else {}


def _digests(summary: Mapping[str, Any]) -> dict[str, str]:
    """The digests of arrays in a summary, by path."""
    leaves = summary.get("leaves")
    if not isinstance(leaves, dict):
        return {}
    return {path: str(leaf["digest"]) for path, leaf in leaves.items() if isinstance(leaf, dict) and "digest" in leaf}


def _storage(chunk_format: ChunkFormat) -> str:
    zarr = "zarr3" if chunk_format.zarr3 else "zarr 2"
    return f"{zarr} in an OCDBT database" if chunk_format.ocdbt else f"{zarr}, each chunk a file"


def _stored(store: ts.TensorStore, digest: str | None) -> StoredArray:
    dtype = store.dtype
    return StoredArray(store.shape, dtype.name, dtype.numpy_dtype.itemsize, store.spec().to_json()["metadata"], digest)


def as_json(contents: CheckpointContents) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "kind": "checkpoint",
        "path": contents.path,
        "finished": contents.finished,
        "storage": contents.storage,
        "odd": [{"kind": type(error).__name__, "message": str(error)} for error in contents.odd],
        "parameters": sum(array.size for array in contents.arrays.values()),
        "bytes": sum(array.nbytes for array in contents.arrays.values()),
        "dtypes": {name: asdict(total) for name, total in dtypes(contents).items()},
        "arrays": {
            path: {
                "shape": list(array.shape),
                "dtype": array.dtype,
                "bytes": array.nbytes,
                "chunk": array.chunk,
                "inner_chunk": array.inner,
                "codecs": array.codecs,
                "digest": array.digest,
                "metadata": dict(array.metadata),
            }
            for path, array in contents.arrays.items()
        },
        "others": dict(contents.others),
        "custom_metadata": dict(contents.custom_metadata),
        "summary": dict(contents.summary),
    }


def dtypes(contents: CheckpointContents) -> dict[str, Total]:
    """The arrays of each dtype, those with most bytes first."""
    return totals((array.dtype, array.nbytes) for array in contents.arrays.values())


def codecs(contents: CheckpointContents) -> dict[str, Total]:
    """The arrays of each chain of codecs, those with most bytes first."""
    return totals((array.codecs, array.nbytes) for array in contents.arrays.values())
