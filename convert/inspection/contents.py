"""Finds out what a path holds, and reads it."""

from typing import Any

from slicecast.convert.inspection import checkpoint, source
from slicecast.convert.inspection.checkpoint import CheckpointContents, is_checkpoint
from slicecast.convert.inspection.source import SourceContents
from slicecast.convert.output import open_output
from slicecast.convert.source.bucket import Bucket
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.index import INDEX, SUFFIX
from slicecast.convert.source.storage import open_storage

Contents = SourceContents | CheckpointContents


def read(path: str, revision: str | None = None) -> Contents:
    """What a path holds: a Hugging Face checkpoint, or one of Orbax.

    Args:
        path: A directory, `gs://`, `https://` or a name on the Hub for the one; a directory or `gs://` for the other.
        revision: A branch, tag or commit on the Hub.

    Raises:
        UsageError: If the path is of no kind that can be read.
        MissingFileError, ReadError, OutputError: If there is nothing, or it cannot be listed.
    """
    storage = open_storage(path, revision)
    if isinstance(storage, Directory | Bucket):
        names = storage.names()
        is_source = INDEX in names or any(name.endswith(SUFFIX) for name in names)
        if is_checkpoint(names) and not is_source:
            return checkpoint.read_checkpoint(open_output(storage.path))
    return source.read_source(storage)


def as_json(contents: Contents) -> dict[str, Any]:
    """Everything, for scripts."""
    return source.as_json(contents) if isinstance(contents, SourceContents) else checkpoint.as_json(contents)
