"""Stores chunks of arrays: zarr3 arrays in OCDBT databases, through TensorStore.

Each process of each run writes its own OCDBT database, `ocdbt.process_<id>`, below the checkpoint's directory; Orbax
merges them when all are done. One transaction writes all chunks of a wave: either all of them are there after a crash,
or none. The keys in the databases are the only record of progress, so it can never disagree with the data.

An array is cut into chunks, each a `sharding_indexed` codec of inner chunks, each of those compressed with zstd level 1
and protected by a crc32c. Level 1 compresses dequantized weights within 2 % of Orbax's level 3 for a fifth of its time,
and without the crc a flipped bit would be read without an error.
"""

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from slicecast.convert.box import Box, Shape
from slicecast.convert.errors import OutputError

PROCESS_PREFIX = "ocdbt.process_"

# Nodes of the B-tree up to this size. A commit rewrites the nodes that it touches, so they should be small beside the
# wave that is committed; a Kimi-K2 checkpoint of 300,000 keys then has a few hundred.
_MAX_NODE_BYTES = 1 << 20

# Array metadata, which is smaller, lies in the tree; chunks, which are larger, lie in data files.
_MAX_INLINE_BYTES = 1024

# Nodes of the B-tree kept in memory.
_NODE_CACHE_BYTES = 32 << 20

_T = TypeVar("_T")


@dataclass(frozen=True)
class ArraySpec:
    """An array to store.

    Attributes:
        name: Its name in the checkpoint, tree keys joined by dots.
        shape: Its shape.
        dtype: Its dtype, as zarr3 calls it: `bfloat16` or `float32`.
        chunk: The shape of a chunk.
        inner: The shape of an inner chunk; divides `chunk`.
    """

    name: str
    shape: Shape
    dtype: str
    chunk: Shape
    inner: Shape

    def key(self, box: Box) -> str:
        """The storage key of the chunk that begins where the box begins."""
        return "/".join([self.name, "c", *(str(s // c) for s, c in zip(box.start, self.chunk, strict=True))])

    def keys(self) -> Iterator[str]:
        """The storage keys of all chunks."""
        grid = [range(-(-size // step)) for size, step in zip(self.shape, self.chunk, strict=True)]
        return ("/".join([self.name, "c", *map(str, index)]) for index in itertools.product(*grid))

    @property
    def metadata_key(self) -> str:
        """The storage key of the array's metadata."""
        return f"{self.name}/zarr.json"

    @property
    def metadata(self) -> dict[str, Any]:
        """The zarr3 metadata."""
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": list(self.inner),
            "codecs": [little_endian, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}],
            "index_codecs": [little_endian, {"name": "crc32c"}],
        }
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }


@dataclass(frozen=True)
class Block:
    """Values for a region of whole chunks.

    Attributes:
        array: The array that they belong to.
        box: The region.
        values: The values `[*box.shape]`, in the array's dtype. Not to be changed until the write is done.
    """

    array: ArraySpec
    box: Box
    values: np.ndarray


class ChunkWriter:
    """Writes chunks to one database of a checkpoint that is being made. Used from several threads.

    Attributes:
        finished: The keys of the chunks that were in storage before, from any process of any earlier run.
    """

    def __init__(self, directory: Path, arrays: Sequence[ArraySpec], process: int, *, writes_metadata: bool):
        """Opens a database of its own in the checkpoint's directory.

        Args:
            directory: Where the databases are.
            arrays: All arrays of the checkpoint.
            process: The index of this process.
            writes_metadata: Whether this process writes the metadata of the arrays; exactly one must.
        """
        self._directory = directory
        self._context = _context()
        self.finished = finished_keys(directory, self._context)
        # A database of its own for each run: nothing that a killed run left half written is ever continued.
        database = directory / f"{PROCESS_PREFIX}{process}x{secrets.token_hex(4)}"
        self._arrays = self._carry_out(self._open(database, arrays, writes_metadata))

    async def _open(self, database: Path, arrays: Sequence[ArraySpec], create: bool) -> dict[str, ts.TensorStore]:
        transaction = ts.Transaction(atomic=True) if create else None
        opened = await asyncio.gather(
            *(
                ts.open(
                    _array_spec(_new_database_spec(database), array),
                    open=True,
                    create=create,
                    assume_metadata=not create,
                    context=self._context,
                    transaction=transaction,
                )
                for array in arrays
            )
        )
        if transaction is not None:
            await transaction.commit_async()
            return await self._open(database, arrays, create=False)
        return {array.name: store for array, store in zip(arrays, opened, strict=True)}

    def missing(self, array: ArraySpec, box: Box) -> list[Box]:
        """The chunks of a region that earlier runs did not finish."""
        return [chunk for chunk in box.tiles(array.chunk) if array.key(chunk) not in self.finished]

    def write(self, blocks: Iterable[Block]) -> None:
        """Writes the missing chunks of all blocks in one transaction, and returns when they are durable.

        Raises:
            OutputError: If storage fails.
        """
        self._carry_out(self._write(blocks))

    def _carry_out(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine to its end, from a thread that has no event loop."""
        try:
            return asyncio.run(coroutine)
        except (OSError, RuntimeError, ValueError) as error:  # What TensorStore raises for a failure of storage.
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise OutputError(
                f"{self._directory}: cannot be written: {cause}. Make space, or mend the storage, and run the same "
                "command again: it goes on."
            ) from error

    async def _write(self, blocks: Iterable[Block]) -> None:
        transaction = ts.Transaction(atomic=True)
        writes = []
        for block in blocks:
            store = self._arrays[block.array.name].with_transaction(transaction)
            for chunk in self.missing(block.array, block.box):
                offset = tuple(a - b for a, b in zip(chunk.start, block.box.start, strict=True))
                inside = Box(offset, tuple(o + n for o, n in zip(offset, chunk.shape, strict=True)))
                # The values outlive the transaction, so TensorStore need not copy them.
                write = store[chunk.slices].write(
                    block.values[inside.slices], can_reference_source_data_indefinitely=True
                )
                writes.append(write)
        await asyncio.gather(*writes)
        await transaction.commit_async()


class ChunkReader:
    """Reads regions of the arrays of a finished checkpoint."""

    def __init__(self, directory: Path):
        """Opens the merged database in the checkpoint's directory."""
        self._database = _database_spec(directory)
        self._context = _context()

    def open(self, name: str) -> ts.TensorStore:
        """The array of this name; its `shape`, `dtype` and chunk layout are the stored ones."""
        spec = {"driver": "zarr3", "kvstore": {**self._database, "path": f"{name}/"}}
        return ts.open(spec, open=True, read=True, context=self._context).result()


def finished_keys(directory: Path, context: ts.Context | None = None) -> frozenset[str]:
    """The keys in all databases that processes have written below a checkpoint's directory."""
    context = context or _context()
    keys: set[str] = set()
    for database in sorted(directory.glob(f"{PROCESS_PREFIX}*")):
        if (database / "manifest.ocdbt").exists():
            store = ts.KvStore.open(_database_spec(database), context=context).result()
            keys.update(key.decode() for key in store.list().result())
    return frozenset(keys)


def missing_keys(directory: Path, arrays: Iterable[ArraySpec]) -> list[str]:
    """The keys that the merged database in a checkpoint's directory should have, but has not."""
    store = ts.KvStore.open(_database_spec(directory), context=_context()).result()
    have = {key.decode() for key in store.list().result()}
    return [key for array in arrays for key in (array.metadata_key, *array.keys()) if key not in have]


def _context() -> ts.Context:
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": _NODE_CACHE_BYTES}})


def _database_spec(directory: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{directory}/", "cache_pool": "cache_pool#ocdbt"}


def _new_database_spec(directory: Path) -> dict[str, Any]:
    config = {
        "max_inline_value_bytes": _MAX_INLINE_BYTES,
        "max_decoded_node_bytes": _MAX_NODE_BYTES,
        "manifest_kind": "single",
    }
    # No process shares its database with another, so no empty manifest need be written first to agree on the config.
    return {**_database_spec(directory), "config": config, "assume_config": True}


def _array_spec(database: dict[str, Any], array: ArraySpec) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {**database, "path": f"{array.name}/"},
        "metadata": array.metadata,
        # A chunk of zeros is stored too: a missing key then always means a chunk that was not written.
        "store_data_equal_to_fill_value": True,
    }
