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

Reading goes through Orbax too, with a handler that opens each array in place of reading it whole.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
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

_METADATA_FILE = "_CHECKPOINT_METADATA"
_COMMIT_FILE = "commit_success.txt"

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
    if in_bucket(output):
        (finished / _COMMIT_FILE).unlink()
    else:
        finished = finished.rename(output / f"{STEP}.orbax-checkpoint-tmp-removed")
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
        custom = json.loads((step / _METADATA_FILE).read_text()).get("custom_metadata")
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
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
    tree = _nest({path: _StreamedLeaf(array) for path, array in arrays.items()})
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


class _OpenHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]
    """Gives each array of a checkpoint as an open TensorStore in place of its values."""

    def typestr(self) -> str:
        """The type of the leaves that this handler reads."""
        return "jax.Array"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("open arrays have their own metadata")

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        raise NotImplementedError("open arrays can only be read")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[ts.TensorStore]:
        return await asyncio.to_thread(self._open, infos)

    def _open(self, infos: Sequence[Any]) -> list[ts.TensorStore]:
        info = infos[0]
        reader = ChunkReader(
            epath.Path(info.parent_dir), ChunkFormat(ocdbt=info.is_ocdbt_checkpoint, zarr3=info.use_zarr3)
        )
        return [reader.open(info.name) for info in infos]


def open_arrays(output: epath.Path) -> dict[str, ts.TensorStore]:
    """The arrays of the finished checkpoint in an output directory, by path, open for reading.

    Raises:
        OutputError: If there is no finished checkpoint.
    """
    step = require_finished(output)
    registry = ocp.type_handlers.create_type_handler_registry((ts.TensorStore, _OpenHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            tree = checkpointer.restore(step / ITEM, args=ocp.args.PyTreeRestore())
    except (OSError, KeyError, TypeError, ValueError) as error:  # What Orbax and TensorStore raise for damaged files.
        raise OutputError(f"{step}: the checkpoint is damaged and cannot be opened: {first_line(error)}") from error
    return _flatten(tree)


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf
        for key, child in tree.items()
        for path, leaf in _flatten(child, f"{prefix}/{key}" if prefix else key).items()
    }
