"""Stores chunks of arrays through TensorStore: zarr arrays, commonly in OCDBT databases, on disks and in buckets.

With OCDBT each process of each run writes databases of its own, `ocdbt.process_<process>x<plan><random>`, below the
checkpoint's directory; Orbax merges them when all are done. One transaction writes all chunks of a wave: either all of
them are there after a crash, or none. Without OCDBT each chunk is a file or object, which is there whole or not at all.
Either way the keys in storage are the only record of progress, so it can never disagree with the data.

A zarr3 array is cut into chunks, each a `sharding_indexed` codec of inner chunks, each of those compressed with zstd
level 1 and protected by a crc32c. Level 1 compresses dequantized weights within 2 % of Orbax's level 3 for a fifth of
its time, and without the crc a flipped bit would be read without an error. zarr 2 has neither inner chunks nor a crc.
"""

import asyncio
import contextlib
import itertools
import queue
import secrets
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
import xxhash
from etils import epath

from slicecast.convert.box import Box, Shape
from slicecast.convert.errors import StorageError, first_line

PROCESS_PREFIX = "ocdbt.process_"

# Nodes of the B-tree up to this size. A commit rewrites the nodes that it touches, so they should be small beside the
# wave that is committed; a Kimi-K2 checkpoint of 300,000 keys then has a few hundred.
_MAX_NODE_BYTES = 1 << 20

# Array metadata, which is smaller, lies in the tree; chunks, which are larger, lie in data files.
_MAX_INLINE_BYTES = 1024

# Nodes of the B-tree kept in memory.
_NODE_CACHE_BYTES = 32 << 20

# A bucket takes one write to the same object a second, and each commit writes a database's manifest.
# https://cloud.google.com/storage/quotas
_BUCKET_SECONDS_BETWEEN_COMMITS = 1.0

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


@dataclass(frozen=True)
class ChunkFormat:
    """How the chunks of arrays become keys in storage.

    Attributes:
        ocdbt: Whether databases hold them; otherwise each is a file or object.
        zarr3: Whether they are those of zarr3; otherwise of zarr 2.
    """

    ocdbt: bool = True
    zarr3: bool = True

    def metadata_key(self, array: ArraySpec) -> str:
        """The storage key of an array's metadata."""
        return f"{array.name}/{'zarr.json' if self.zarr3 else '.zarray'}"

    def key(self, array: ArraySpec, box: Box) -> str:
        """The storage key of the chunk that begins where the box begins."""
        return self._key(array, [start // size for start, size in zip(box.start, array.chunk, strict=True)])

    def keys(self, array: ArraySpec) -> Iterator[str]:
        """The storage keys of all chunks of an array, in row-major order."""
        grid = [range(-(-size // step)) for size, step in zip(array.shape, array.chunk, strict=True)]
        return (self._key(array, index) for index in itertools.product(*grid))

    def _key(self, array: ArraySpec, index: Sequence[int]) -> str:
        if self.zarr3:
            return "/".join([array.name, "c", *map(str, index)])
        return f"{array.name}/{'.'.join(map(str, index)) or '0'}"

    def array(self, array: ArraySpec, store: Mapping[str, Any] | str) -> dict[str, Any]:
        """The TensorStore spec of an array in a key-value store."""
        return {
            **self.existing_array(array.name, store),
            "metadata": _zarr3_metadata(array) if self.zarr3 else _zarr2_metadata(array),
            # A chunk of zeros is stored too: a missing key then always means a chunk that was not written.
            "store_data_equal_to_fill_value": True,
        }

    def existing_array(self, name: str, store: Mapping[str, Any] | str) -> dict[str, Any]:
        """The TensorStore spec of an array that is there."""
        kvstore = f"{store}{name}/" if isinstance(store, str) else {**store, "path": f"{name}/"}
        return {"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": kvstore}

    def store(self, directory: epath.Path) -> dict[str, Any] | str:
        """The TensorStore spec of the key-value store with a finished checkpoint's arrays."""
        return _database(directory) if self.ocdbt else url(directory)


def _zarr3_metadata(array: ArraySpec) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(array.inner),
        "codecs": [little_endian, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    return {
        "shape": list(array.shape),
        "data_type": array.dtype,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _zarr2_metadata(array: ArraySpec) -> dict[str, Any]:
    # What TensorStore calls dtypes in zarr 2: those that NumPy lacks by name, the others as NumPy does.
    dtype = np.dtype(array.dtype)
    return {
        "shape": list(array.shape),
        "dtype": dtype.str if dtype.kind == "f" else array.dtype,
        "fill_value": None,
        "chunks": list(array.chunk),
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
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
    """Writes chunks of a checkpoint that is being made. Used from several threads.

    Attributes:
        format: How chunks become keys.
        finished: The keys of the chunks that were in storage before, from any process of any earlier run.
    """

    def __init__(
        self,
        directory: epath.Path,
        arrays: Sequence[ArraySpec],
        process: int,
        *,
        writes_metadata: bool,
        chunk_format: ChunkFormat,
        plan: str,
    ):
        """Finds out what there is, and writes the metadata of the arrays.

        Args:
            directory: The checkpoint's directory.
            arrays: All arrays of the checkpoint.
            process: The index of this process.
            writes_metadata: Whether this process writes the metadata of the arrays; exactly one must.
            chunk_format: How chunks become keys.
            plan: The digest of what is written.
        """
        self.format = chunk_format
        self._directory = directory
        self._arrays = arrays
        self._prefix = f"{PROCESS_PREFIX}{process}x{_mark(plan)}"
        self._context = _context()
        self._pause = _BUCKET_SECONDS_BETWEEN_COMMITS if in_bucket(directory) and chunk_format.ocdbt else 0.0
        self.finished = finished_keys(directory, chunk_format, plan, self._context)
        # Those that no thread uses now. Each is committed to by one thread at a time, so that commits can be spaced.
        self._idle: queue.SimpleQueue[_Database] = queue.SimpleQueue()
        if writes_metadata:
            self._carry_out(self._write_metadata())

    def missing(self, array: ArraySpec, box: Box) -> list[Box]:
        """The chunks of a region that earlier runs did not finish."""
        return [chunk for chunk in box.tiles(array.chunk) if self.format.key(array, chunk) not in self.finished]

    def write(self, blocks: Iterable[Block]) -> dict[str, str]:
        """Writes the missing chunks of all blocks in one transaction, and returns when they are durable.

        Returns:
            The digest of each chunk that was written, by its key; see `digest`.

        Raises:
            StorageError: If storage fails.
        """
        return self._carry_out(self._write(blocks))

    def _carry_out(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine to its end, from a thread that has no event loop."""
        try:
            return asyncio.run(coroutine)
        except (OSError, RuntimeError, ValueError) as error:  # What TensorStore raises for a failure of storage.
            raise StorageError(
                f"{self._directory}: cannot be written: {first_line(error)}. Make space, or mend the storage, and run "
                "the same command again: it goes on."
            ) from error

    def _new_store(self) -> dict[str, Any] | str:
        if not self.format.ocdbt:
            return url(self._directory)
        # A database of its own for each run: nothing that a killed run left half written is ever continued.
        return _new_database(self._directory / f"{self._prefix}{secrets.token_hex(4)}")

    async def _write_metadata(self) -> None:
        store = self._new_store()
        # Files are written one by one: in a transaction, those that another run writes meanwhile would be an error.
        transaction = ts.Transaction(atomic=True) if self.format.ocdbt else None
        await asyncio.gather(
            *(
                ts.open(
                    self.format.array(array, store),
                    open=True,
                    create=True,
                    context=self._context,
                    transaction=transaction,
                )
                for array in self._arrays
            )
        )
        if transaction is not None:
            await transaction.commit_async()
        self._idle.put(await self._opened(store))

    async def _opened(self, store: dict[str, Any] | str) -> "_Database":
        opened = await asyncio.gather(
            *(
                ts.open(self.format.array(array, store), open=True, assume_metadata=True, context=self._context)
                for array in self._arrays
            )
        )
        return _Database(
            {array.name: found for array, found in zip(self._arrays, opened, strict=True)}, time.monotonic()
        )

    async def _write(self, blocks: Iterable[Block]) -> dict[str, str]:
        try:
            database = self._idle.get_nowait()
        except queue.Empty:
            database = await self._opened(self._new_store())
        transaction = ts.Transaction(atomic=self.format.ocdbt)
        writes = []
        digests = {}
        for block in blocks:
            store = database.arrays[block.array.name].with_transaction(transaction)
            for chunk in self.missing(block.array, block.box):
                offset = tuple(a - b for a, b in zip(chunk.start, block.box.start, strict=True))
                inside = Box(offset, tuple(o + n for o, n in zip(offset, chunk.shape, strict=True)))
                values = block.values[inside.slices]
                digests[self.format.key(block.array, chunk)] = digest(values)
                # The values outlive the transaction, so TensorStore need not copy them.
                writes.append(store[chunk.slices].write(values, can_reference_source_data_indefinitely=True))
        await asyncio.gather(*writes)
        await asyncio.sleep(max(0.0, database.committed + self._pause - time.monotonic()))
        await transaction.commit_async()
        self._idle.put(_Database(database.arrays, time.monotonic()))
        return digests


@dataclass(frozen=True)
class _Database:
    """Open arrays to write to, and when they were last committed to, by `time.monotonic()`."""

    arrays: Mapping[str, ts.TensorStore]
    committed: float


class ChunkReader:
    """Reads regions of the arrays of a finished checkpoint."""

    def __init__(self, directory: epath.Path, chunk_format: ChunkFormat):
        """A reader of the arrays in the checkpoint's directory."""
        self._format = chunk_format
        self._store = chunk_format.store(directory)
        self._context = _context()

    def open(self, name: str) -> ts.TensorStore:
        """The array of this name; its `shape`, `dtype` and chunk layout are the stored ones."""
        spec = self._format.existing_array(name, self._store)
        return ts.open(spec, open=True, read=True, context=self._context).result()


def digest(values: np.ndarray) -> str:
    """The XXH3 of 128 bits of values in row-major order, little-endian, as hexadecimal digits.

    It finds mistakes, not forgeries. SHA-256 took a fifth of a conversion's processor time.
    """
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).view(np.uint8).data)


def finished_keys(directory: epath.Path, chunk_format: ChunkFormat, plan: str, context: ts.Context) -> frozenset[str]:
    """The keys that processes have written below a checkpoint's directory, following a plan."""
    if not chunk_format.ocdbt:
        return _keys(url(directory), context)
    return frozenset().union(
        *(_keys(_database(found), context) for found in _databases(directory) if _is_of(found, plan))
    )


def foreign_databases(directory: epath.Path, plan: str) -> list[str]:
    """The databases below a checkpoint's directory that were written following another plan, by name."""
    return [found.name for found in _databases(directory) if not _is_of(found, plan)]


def _databases(directory: epath.Path) -> list[epath.Path]:
    return [found for found in sorted(directory.glob(f"{PROCESS_PREFIX}*")) if (found / "manifest.ocdbt").exists()]


def _is_of(database: epath.Path, plan: str) -> bool:
    name: str = database.name
    return name.removeprefix(PROCESS_PREFIX).partition("x")[2].startswith(_mark(plan))


def _mark(plan: str) -> str:
    """What stands for a plan in the name of a database."""
    return plan[:12]


def missing_keys(directory: epath.Path, arrays: Iterable[ArraySpec], chunk_format: ChunkFormat) -> list[str]:
    """The keys that a checkpoint's directory should have once databases are merged, but has not."""
    have = _keys(chunk_format.store(directory), _context())
    return [
        key
        for array in arrays
        for key in (chunk_format.metadata_key(array), *chunk_format.keys(array))
        if key not in have
    ]


def in_bucket(directory: epath.Path) -> bool:
    """Whether a path is one in a bucket, and not a directory."""
    return "://" in str(directory)


def url(directory: epath.Path) -> str:
    """What TensorStore calls a directory."""
    path = str(directory).rstrip("/")
    return f"{path}/" if in_bucket(directory) else f"file://{path}/"


def files(directory: epath.Path) -> ts.KvStore:
    """The files of a directory, or the objects below a path in a bucket; each is there whole or not at all."""
    return ts.KvStore.open(url(directory)).result()


def remove_tree(directory: epath.Path) -> None:
    """Removes all that is in a directory or below a path in a bucket."""
    if in_bucket(directory):
        # gcsfs also removes the directories, which a bucket does not have, and fails.
        files(directory).delete_range(ts.KvStore.KeyRange()).result()
        return
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):  # Another run removes it too.
            directory.rmtree(missing_ok=True)


def _keys(store: dict[str, Any] | str, context: ts.Context) -> frozenset[str]:
    return frozenset(key.decode() for key in ts.KvStore.open(store, context=context).result().list().result())


def _context() -> ts.Context:
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": _NODE_CACHE_BYTES}})


def _database(directory: epath.Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": url(directory), "cache_pool": "cache_pool#ocdbt"}


def _new_database(directory: epath.Path) -> dict[str, Any]:
    config = {
        "max_inline_value_bytes": _MAX_INLINE_BYTES,
        "max_decoded_node_bytes": _MAX_NODE_BYTES,
        "manifest_kind": "single",
    }
    # No process shares its database with another, so no empty manifest need be written first to agree on the config.
    return {**_database(directory), "config": config, "assume_config": True}
