"""Orbax: the only module that knows it.

Writing is one `AsyncCheckpointer.save` of a tree whose leaves do not exist: a `TypeHandler` of our own receives them,
and its commit future runs the conversion, which writes chunks to storage itself (`chunk_store.py`). Orbax contributes
what makes the result an ordinary checkpoint: the directory layout, the tree metadata, the barriers between hosts, the
merge of the per-process databases, and the commit.

    <output>/0.orbax-checkpoint-tmp/    while it is written: nothing that a loader would open
    <output>/0/items/                   after the commit, which renames

A bucket cannot rename. There `<output>/0/` is written in place, and the commit is the file `commit_success.txt`,
without which Orbax loads nothing.

A killed run leaves an unfinished step. The next run continues in it (`_continuing`), where Orbax by itself would delete
it.

Reading goes through Orbax too: its tree metadata say which arrays there are, and each is opened in place of being read
whole.
"""

import asyncio
import contextlib
import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import future as ocp_future
from orbax.checkpoint import path as ocp_path

from slicecast.convert.chunk_store import (
    ArraySpec,
    ChunkFormat,
    ChunkReader,
    ChunkWriter,
    foreign_databases,
    in_bucket,
    missing_keys,
    remove_tree,
)
from slicecast.convert.errors import IncompleteError, OutputError, SlicecastError, StorageError, first_line

STEP = "0"
ITEM = "items"

# Orbax limits a whole save, with the conversion in it, to 20 minutes by default. A week is longer than any conversion,
# and only there so that a hang ends.
_TIMEOUT_SECONDS = 7 * 24 * 3600

# What Orbax writes into a step, and into an item that is a tree.
STEP_METADATA_FILE = "_CHECKPOINT_METADATA"
TREE_METADATA_FILE = "_METADATA"
_COMMIT_FILE = "commit_success.txt"

# The types of leaves that are stored as arrays, as the tree metadata calls them.
_ARRAYS = frozenset(("jax.Array", "np.ndarray", "scalar"))

Convert = Callable[[ChunkWriter], None]


@dataclasses.dataclass(frozen=True)
class _StreamedLeaf:
    """A leaf that does not exist: what Orbax sees of an array that will be written chunk by chunk."""

    array: ArraySpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)


class _StreamHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]
    """Writes streamed leaves by running a conversion in the background."""

    def __init__(self, convert: Convert, chunk_format: ChunkFormat, plan: str):
        self._convert = convert
        self._format = chunk_format
        self._plan = plan

    def typestr(self) -> str:
        """What the tree metadata says of each leaf: on disk it is an ordinary array."""
        return "jax.Array"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("streamed leaves can only be written")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("streamed leaves can only be written")

    async def serialize(
        self, values: Sequence[_StreamedLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[ocp_future.Future]:
        return [ocp_future.CommitFutureAwaitingContractedSignals(self._run(values, infos), name="slicecast")]

    async def _run(self, values: Sequence[_StreamedLeaf], infos: Sequence[Any]) -> None:
        for info in infos:
            await info.await_path_creation()
        names = [info.name for info in infos]
        if names != [value.array.name for value in values]:
            raise OutputError(
                f"Orbax names the leaves {names[:3]}..., which is not what slicecast expects; use another version."
            )
        directory = epath.Path(infos[0].parent_dir)
        arrays = [value.array for value in values]
        process = jax.process_index()
        # In a thread of its own: the conversion blocks, and this coroutine's loop must stay free.
        await asyncio.to_thread(
            lambda: self._convert(
                ChunkWriter(
                    directory,
                    arrays,
                    process,
                    writes_metadata=process == 0,
                    chunk_format=self._format,
                    plan=self._plan,
                )
            )
        )


def _continuing(
    output: epath.Path,
    arrays: Sequence[ArraySpec],
    chunk_format: ChunkFormat,
    plan: str,
    before_commit: Callable[[], None],
) -> type[ocp_path.atomicity_types.TemporaryPath]:
    """A temporary directory that a killed run's successor continues in, and that is committed only if it is complete.

    Orbax does not look whether all chunks of all arrays are there, and the loader that MaxText uses reads a missing
    chunk as zeros.
    """
    base = (
        ocp_path.atomicity.CommitFileTemporaryPath
        if in_bucket(output)
        else ocp_path.atomicity.AtomicRenameTemporaryPath
    )

    class Continuing(base):  # type: ignore[misc, valid-type]
        async def create(self) -> epath.Path:
            temporary, final = self.get(), self.get_final()
            is_item = temporary.name.startswith(ITEM)
            if not is_item and finished_checkpoint(output) is not None:
                raise OutputError(f"{final}: another run has finished this checkpoint meanwhile.")
            if final != temporary and final.exists() and not temporary.exists():
                final.rename(temporary)  # Killed after the item was renamed and before the step was.
            if temporary.exists() and (is_item or has_data(temporary)):
                if final != temporary:  # In a bucket another run may be finishing it right now.
                    (temporary / _COMMIT_FILE).unlink(missing_ok=True)
                return temporary
            return await super().create()

        async def finalize(self) -> None:
            if self.get().name.startswith(ITEM):
                # After the merge, so that nothing can have come in between.
                foreign = await asyncio.to_thread(foreign_databases, self.get(), plan)
                if foreign:
                    raise OutputError(
                        f"{self.get()}: {foreign[0]} was written by a run with another plan, so the checkpoint was "
                        "not committed. Make sure that no other run is there, and start again with --overwrite."
                    )
                missing = await asyncio.to_thread(missing_keys, self.get(), arrays, chunk_format)
                if missing:
                    raise IncompleteError(
                        f"{self.get()}: {len(missing)} chunks are missing, among them {missing[:3]}; the checkpoint "
                        "was not committed. Run the same command again: it writes what is missing."
                    )
            before_commit()
            await super().finalize()

    return Continuing


def finished_checkpoint(output: epath.Path) -> epath.Path | None:
    """The directory of the finished checkpoint in an output directory, if there is one."""
    step = output / STEP
    finished = (step / _COMMIT_FILE).exists() if in_bucket(output) else step.exists()
    return step if finished else None


def unfinished_checkpoint(output: epath.Path) -> epath.Path | None:
    """The directory that an interrupted run left in an output directory, if there is one."""
    return next(iter(_unfinished(output)), None)


def _unfinished(output: epath.Path) -> list[epath.Path]:
    if in_bucket(output):
        step = output / STEP
        return [step] if step.exists() and finished_checkpoint(output) is None else []
    return list(output.glob(f"{STEP}.orbax-checkpoint-tmp*"))


def has_data(step: epath.Path) -> bool:
    """Whether a step's directory holds more than its own metadata."""
    return any(child.name.startswith(ITEM) for child in step.iterdir())


def remove(output: epath.Path) -> None:
    """Removes a checkpoint, finished or not, from an output directory."""
    finished = finished_checkpoint(output)
    for step in _unfinished(output):
        remove_tree(step)
    if finished is None:
        return
    # First it is made an unfinished one, so that what is left of it after a kill never looks whole.
    with contextlib.suppress(FileNotFoundError):  # Another run removes it too.
        if in_bucket(output):
            (finished / _COMMIT_FILE).unlink()
        else:
            finished = finished.rename(output / f"{STEP}.orbax-checkpoint-tmp-removed-{secrets.token_hex(4)}")
        remove_tree(finished)


def require_finished(output: epath.Path) -> epath.Path:
    """The directory of the finished checkpoint in an output directory.

    Raises:
        OutputError: If there is none.
    """
    step = finished_checkpoint(output)
    if step is None:
        state = "an unfinished one: run convert again to finish it" if unfinished_checkpoint(output) else "nothing"
        raise OutputError(f"{output / STEP}: a finished checkpoint is expected, found {state}.")
    return step


def read_custom_metadata(step: epath.Path) -> Mapping[str, Any]:
    """The custom metadata of a finished step; empty where there is none."""
    try:
        metadata = json.loads((step / STEP_METADATA_FILE).read_text())
    except (FileNotFoundError, ValueError):  # Not JSON, or not even text.
        return {}
    custom = metadata.get("custom_metadata") if isinstance(metadata, dict) else None
    return custom if isinstance(custom, dict) else {}


def read_own_metadata(step: epath.Path) -> Mapping[str, Any]:
    """What slicecast wrote into the metadata of a step; empty where it did not write it."""
    own = read_custom_metadata(step).get("slicecast")
    return own if isinstance(own, dict) else {}


def save(
    output: epath.Path,
    arrays: Mapping[str, ArraySpec],
    convert: Convert,
    custom_metadata: Mapping[str, Any],
    *,
    chunk_format: ChunkFormat,
    plan: str,
    before_commit: Callable[[], None],
) -> None:
    """Writes a checkpoint to `<output>/0/items`, or goes on with an unfinished one; called by all processes.

    Args:
        output: A directory or path in a bucket, the same on all processes.
        arrays: The arrays by path in the tree, as `params/decoder/...`.
        convert: Writes all chunks of this process.
        custom_metadata: Goes into the step's metadata.
        chunk_format: How chunks are stored.
        plan: The digest of what is written; chunks of another are never taken over.
        before_commit: Called on process 0 when all is written; an error keeps the checkpoint from being committed.

    Raises:
        StorageError: If storage fails.
        IncompleteError: If chunks are missing at the end.
        SlicecastError: Whatever `convert` and `before_commit` raise.
    """
    processes = ocp.options.MultiprocessingOptions(
        # Named processes make Orbax's barriers use the coordination service. Without, they are device collectives,
        # which could mix with the conversion's own programs on the chips.
        active_processes=set(range(jax.process_count()))
    )
    temporary_path_class = _continuing(output, list(arrays.values()), chunk_format, plan, before_commit)
    handler_of_leaves = _StreamHandler(convert, chunk_format, plan)
    registry = ocp.type_handlers.create_type_handler_registry((_StreamedLeaf, handler_of_leaves))
    handler = ocp.CompositeCheckpointHandler(
        **{
            ITEM: ocp.PyTreeCheckpointHandler(
                use_ocdbt=chunk_format.ocdbt,
                use_zarr3=chunk_format.zarr3,
                type_handler_registry=registry,
                multiprocessing_options=processes,
            )
        },
        composite_options=ocp.CompositeOptions(
            temporary_path_class=temporary_path_class, multiprocessing_options=processes
        ),
    )
    checkpointer = ocp.AsyncCheckpointer(
        handler,
        async_options=ocp.options.AsyncOptions(timeout_secs=_TIMEOUT_SECONDS),
        temporary_path_class=temporary_path_class,
        multiprocessing_options=processes,
        # In a bucket the step is there already when a run goes on. What is finished has been looked for before.
        file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
    )
    tree = nest({path: _StreamedLeaf(array) for path, array in arrays.items()})
    try:
        with checkpointer:
            checkpointer.save(
                output / STEP,
                args=ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(tree)}),
                custom_metadata=dict(custom_metadata),
            )
            checkpointer.wait_until_finished()
    except SlicecastError:
        raise
    except Exception as error:  # Each backend of epath has its own, and Orbax those of its barriers.
        raise StorageError(
            f"{output}: the checkpoint could not be finished, because storage or another process failed: "
            f"{first_line(error)}. Run the same command again: it goes on."
        ) from error


@dataclasses.dataclass(frozen=True)
class _NamedLeaf:
    """The type of a leaf, as the tree metadata calls it, and its name in storage."""

    kind: str
    name: str


class _LeafHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]
    """Tells of which type each leaf is and what it is called, and reads nothing."""

    def __init__(self, kind: str):
        self._kind = kind

    def typestr(self) -> str:
        """The type of the leaves, as the tree metadata calls it."""
        return self._kind

    async def metadata(self, infos: Sequence[Any]) -> Sequence["_NamedLeaf"]:
        return [_NamedLeaf(self._kind, info.name) for info in infos]

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        raise NotImplementedError("these leaves can only be named")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        raise NotImplementedError("these leaves can only be named")


class _AnyType(ocp.type_handlers.TypeHandlerRegistry):  # type: ignore[misc]
    """Has a `_LeafHandler` for every type of leaves."""

    def add(self, ty: Any, handler: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError("all types are there")

    def get(self, ty: Any) -> _LeafHandler:
        return _LeafHandler(str(ty))

    def has(self, ty: Any) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class StoredTree:
    """The tree of an item, whatever program has written it with Orbax.

    Attributes:
        chunk_format: How its arrays are stored.
        arrays: The arrays by path, open for reading.
        others: What the other leaves are, by path: a text, or a node without leaves.
    """

    chunk_format: ChunkFormat
    arrays: Mapping[str, ts.TensorStore]
    others: Mapping[str, str]


def is_finished(directory: epath.Path) -> bool:
    """Whether the directory of a step, or of an item, has been committed."""
    return bool(ocp_path.step.is_checkpoint_finalized(directory))


def open_tree(item: epath.Path) -> StoredTree:
    """Opens the arrays of an item. Reads metadata, and none of the values.

    Raises:
        OutputError: If it is damaged, or holds no tree.
    """
    try:
        found = ocp.PyTreeCheckpointHandler(type_handler_registry=_AnyType()).metadata(item)
        chunk_format = ChunkFormat(ocdbt=ocp.type_handlers.is_ocdbt_checkpoint(item), zarr3=bool(found.use_zarr3))
        reader = ChunkReader(item, chunk_format)
        names: dict[str, str] = {}
        others: dict[str, str] = {}
        for path, leaf in _flatten(found.tree):
            if not isinstance(leaf, _NamedLeaf):
                others[path] = f"an empty {type(leaf).__name__}"
            elif leaf.kind in _ARRAYS:
                names[path] = leaf.name
            else:
                others[path] = leaf.kind
        with ThreadPoolExecutor() as pool:
            arrays = dict(zip(names, pool.map(reader.open, names.values()), strict=True))
    except Exception as error:  # Orbax, TensorStore and the backends of epath have errors of many types.
        cause = first_line(error).partition(" [tensorstore_spec=")[0]
        raise OutputError(f"{item}: the checkpoint is damaged and cannot be opened: {cause}") from error
    return StoredTree(chunk_format, arrays, others)


def open_arrays(output: epath.Path) -> Mapping[str, ts.TensorStore]:
    """The arrays of the finished checkpoint in an output directory, by path, open for reading.

    Raises:
        OutputError: If there is no finished checkpoint.
    """
    return open_tree(require_finished(output) / ITEM).arrays


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as a tree."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _flatten(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree, and its nodes without leaves, by path."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not node)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]
